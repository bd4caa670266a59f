"""The same training with Lightning and its TensorBoardLogger.

torchrun --nproc-per-node 2 -m benchmarks.peers.with_lightning --steps 300 --batch 100 --directory DIR
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.peers.common import arguments, network, training_data


class Digits(lightning.LightningModule):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    options = arguments(__doc__).parse_args()
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(training_data(), batch_size=options.batch // options.workers, shuffle=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=options.workers,
        strategy="ddp",
        max_steps=options.steps,
        max_epochs=-1,
        logger=TensorBoardLogger(options.directory),
        log_every_n_steps=50,
        # The other systems do not draw a progress bar or save during the timed steps either.
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(network(options)), loader)


if __name__ == "__main__":
    main()
