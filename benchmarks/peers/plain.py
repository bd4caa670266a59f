"""A plain training script: DistributedDataParallel under torchrun, TensorBoard from rank 0.

torchrun --nproc-per-node 2 -m benchmarks.peers.plain --steps 300 --batch 100 --directory DIR
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from benchmarks.peers.common import arguments, network, shared_loader, steps, training_data


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--channels-last", action="store_true", help="images and weights in channels-last memory")
    parser.add_argument("--tuned", action="store_true", help="fused optimizer, gradients as views of DDP's buckets")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    loader, sampler = shared_loader(training_data(), options.batch)
    model = network(options)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=options.tuned)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, fused=True if options.tuned else None)
    writer = SummaryWriter(options.directory) if dist.get_rank() == 0 else None

    for step, (x, y) in steps(loader, options.steps, sampler):
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(x.to(memory_format=layout)), y)
        loss.backward()
        optimizer.step()
        if writer is not None and step % 50 == 0:
            writer.add_scalar("train/loss", loss.item(), step)
    if writer is not None:
        writer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
