"""A rank that leaves its group: whoever waits for it, and whatever of its own is under way, ends at once."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launcher.engine.runtime import Runtime
from tests.stores import free_port


def _rank(rank: int, port: int, own_pending: bool, ended: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    runtime = Runtime(1, 2, 0, 1, torch.device("cpu"))
    runtime.enter_groups(rank, 2, store, timedelta(seconds=20))
    runtime.add_up(torch.zeros(1))
    if rank == 0:
        work = dist.all_reduce(torch.zeros(2), async_op=True) if own_pending else None
        time.sleep(1)
        began = time.monotonic()
        runtime.leave_groups()
        if work is not None:
            with pytest.raises(RuntimeError):
                work.wait()
        ended.put((rank, time.monotonic() - began))
    elif not own_pending:
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            runtime.add_up(torch.zeros(3))
        ended.put((rank, time.monotonic() - began))
    time.sleep(20)
    os._exit(0)


@pytest.mark.parametrize("own_pending", [False, True])
def test_leaving_ends_what_is_under_way_at_both_ends(own_pending: bool) -> None:
    context = mp.get_context("spawn")
    ended = context.Queue()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, own_pending, ended), daemon=True) for rank in (0, 1)]
    for one in ranks:
        one.start()
    try:
        for _ in range(1 if own_pending else 2):
            _, seconds = ended.get(timeout=60)
            assert seconds < 10  # the timeout of a collective is 120
    finally:
        for one in ranks:
            one.kill()
