"""A plain training script for one process: no launcher, no DDP.

python -m benchmarks.peers.alone --steps 2 --batch 100 --directory DIR --first-step FILE
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks import timed
from benchmarks.peers.common import arguments, first_step_arguments, steps, training_data


def main() -> None:
    parser = first_step_arguments(arguments(__doc__))
    parser.add_argument("--without-tensorboard", action="store_true", help="write nothing")
    options = parser.parse_args()
    writer = None
    if not options.without_tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(options.directory)
    torch.manual_seed(0)
    loader = DataLoader(training_data(options.limit), batch_size=options.batch, shuffle=True)
    model = timed.ConvNet()
    optimizer = timed.AdamW(model.parameters(), lr=1e-3, first_step=options.first_step)
    for step, (x, y) in steps(loader, options.steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if writer is not None and step % 50 == 0:
            writer.add_scalar("train/loss", loss.item(), step)
    if writer is not None:
        writer.close()


if __name__ == "__main__":
    main()
