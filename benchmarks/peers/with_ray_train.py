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

from benchmarks.peers.common import arguments


def train(config: dict[str, Any]) -> None:
    from benchmarks import timed
    from benchmarks.peers.common import training_data

    torch.manual_seed(0)
    workers = ray.train.get_context().get_world_size()
    loader = DataLoader(training_data(config["limit"]), batch_size=config["batch"] // workers, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    model = ray.train.torch.prepare_model(timed.ConvNet())
    optimizer = timed.AdamW(model.parameters(), lr=1e-3, first_step=config["first_step"])
    step = 0
    while step < config["steps"]:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            if step == config["steps"]:
                break


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--first-step", required=True, help="file for the time of the first step")
    parser.add_argument("--limit", type=int, help="use so many of the training pictures")
    options = parser.parse_args()
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={name: getattr(options, name) for name in ("steps", "batch", "first_step", "limit")},
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers),
        run_config=ray.train.RunConfig(storage_path=options.directory),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
