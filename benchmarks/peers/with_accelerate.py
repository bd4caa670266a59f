"""The same training with Hugging Face Accelerate.

torchrun --nproc-per-node 2 -m benchmarks.peers.with_accelerate --steps 300 --batch 100 --directory DIR
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from benchmarks.peers.common import arguments, network, steps, training_data


def main() -> None:
    options = arguments(__doc__).parse_args()
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=options.directory)
    accelerator.init_trackers("benchmark")
    set_seed(0)
    loader = DataLoader(training_data(), batch_size=options.batch // accelerator.num_processes, shuffle=True)
    model = network(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for step, (x, y) in steps(loader, options.steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        if step % 50 == 0:
            accelerator.log({"train/loss": loss.item()}, step=step)
    accelerator.end_training()


if __name__ == "__main__":
    main()
