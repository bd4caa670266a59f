"""Runs on each node at the same time: sums tensors over NCCL and prints rank 0's findings as one JSON object.

    python -I - RANK WORLD ADDRESS < nccl_probe.py

NCCL's own log names the interface or the InfiniBand device that it uses; no address is printed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

PORT, MEGABYTES, ROUNDS = 29533, 64, 20


def main(rank: int, world: int, address: str) -> None:
    log = Path(tempfile.mkdtemp()) / "nccl.log"
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(log)}
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        print(json.dumps({"why": "PyTorch finds no GPU on the node"}))
        return
    torch.cuda.set_device(0)
    place, limit = f"tcp://{address}:{PORT}", timedelta(seconds=180)
    dist.init_process_group("nccl", init_method=place, rank=rank, world_size=world, timeout=limit)
    tensor = torch.full((MEGABYTES * 2**18,), float(rank + 1), device="cuda")
    dist.all_reduce(tensor)
    right = bool((tensor == world * (world + 1) / 2).all())
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / ROUNDS
    travels = 2 * (world - 1) / world * tensor.numel() * tensor.element_size()
    text = log.read_text(errors="replace") if log.exists() else ""
    used = re.findall(r"NET/(\w+)\s*:\s*Using \[\d+\]([\w.-]+)", text)
    found = {
        "right": right,
        "gbit": travels / seconds * 8 / 1e9,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "transport": used[0][0] if used else "",
        "interface": used[0][1] if used else "",
    }
    dist.destroy_process_group()
    print(json.dumps(found))


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
