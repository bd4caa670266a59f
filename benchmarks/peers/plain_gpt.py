"""A GPT trained by hand: DistributedDataParallel under torchrun, bfloat16, TensorBoard from rank 0.

torchrun --nproc-per-node 2 -m benchmarks.peers.plain_gpt --steps 60 --batch 32 --directory DIR
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from benchmarks import timed
from benchmarks.peers.common import arguments, shared_loader, steps
from models.language_data import KingJames

LOG_EVERY = 10


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tuned", action="store_true", help="fused optimizer, gradients as views of DDP's buckets")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data: Any = KingJames().train
    loader, sampler = shared_loader(data, options.batch, collate_fn=lambda batch: batch, drop_last=True)
    model = timed.GPT(turns=options.turns)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=options.tuned)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, fused=True if options.tuned else None)
    writer = SummaryWriter(options.directory) if dist.get_rank() == 0 else None

    for step, (x, y) in steps(loader, options.steps, sampler):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = wrapped(x)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        if writer is not None and step % LOG_EVERY == 0:
            writer.add_scalar("train/loss", loss.item(), step)
    if writer is not None:
        writer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
