"""The same training by hand on Ray Train, with everything at its default.

python -m benchmarks.peers.with_ray_train --steps 2 --batch 100 --directory DIR --first-step FILE
"""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.peers.common import arguments, first_step_arguments


def train(config: dict[str, Any]) -> None:
    from benchmarks import timed
    from benchmarks.peers.common import steps, training_data

    torch.manual_seed(0)
    workers = ray.train.get_context().get_world_size()
    loader = DataLoader(training_data(config["limit"]), batch_size=config["batch"] // workers, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    model = ray.train.torch.prepare_model(timed.ConvNet())
    optimizer = timed.AdamW(model.parameters(), lr=1e-3, first_step=config["first_step"])
    for _, (x, y) in steps(loader, config["steps"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


def main() -> None:
    options = first_step_arguments(arguments(__doc__)).parse_args()
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={name: getattr(options, name) for name in ("steps", "batch", "first_step", "limit")},
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers),
        run_config=ray.train.RunConfig(storage_path=options.directory),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
