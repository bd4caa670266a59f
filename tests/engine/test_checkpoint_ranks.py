"""Checkpoints of several gloo processes: the files of each rank, other world sizes on load, failing and dying ranks."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from launcher.engine import checkpoint
from launcher.errors import CheckpointError

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["launcher.engine.checkpoint.training", "torch.distributed.fsdp", "torch._dynamo"])


def _rank(
    rank: int, world_size: int, store: str, queue: Any, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
        answer = pickle.dumps(body(rank, group, *arguments))  # the queue would send tensors as handles of this process
        queue.put((rank, None, answer))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
    else:
        with contextlib.suppress(RuntimeError):  # a test may have killed the others
            dist.barrier()
    dist.destroy_process_group()


def run(world_size: int, body: Callable[..., Any], *arguments: Any, tmp_path: Path, dying: int = 0) -> list[Any]:
    """Run `body(rank, group, *arguments)` in `world_size` processes; return the results of all but `dying` of them."""
    store = tmp_path / f"store-{time.monotonic_ns()}"
    queue = FORKSERVER.Queue()
    given = [(rank, world_size, str(store), queue, body, arguments) for rank in range(world_size)]
    processes = [FORKSERVER.Process(target=_rank, args=one) for one in given]
    for process in processes:
        process.start()
    try:
        answers = sorted(queue.get(timeout=240) for _ in range(world_size - dying))
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    problems = [problem for _, problem, _ in answers if problem]
    assert not problems, "\n".join(problems)
    return [pickle.loads(answer) for _, _, answer in answers]


def net() -> nn.Sequential:
    torch.manual_seed(5)
    # With one row, some ranks have an empty shard.
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(), nn.Linear(1, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)  # the same batch on all ranks, so that the number of ranks only affects rounding
    loss = model(torch.randn(4, 7)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def full(nest: Any) -> Any:
    if isinstance(nest, dict):
        return {key: full(value) for key, value in nest.items()}
    if isinstance(nest, DTensor):
        return nest.full_tensor().clone()
    return nest.detach().clone() if isinstance(nest, torch.Tensor) else nest


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# --- replicated ------------------------------------------------------------------------------------------------------


def save_replicated(rank: int, group: dist.ProcessGroup, directory: str) -> Any:
    model = DistributedDataParallel(net())
    model.register_buffer("seen", torch.tensor([0.0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    checkpointer = checkpoint.Checkpointer(directory, keep=5, group=group)
    drifting = torch.full((3,), float(rank))  # like batch statistics: rank 0's value is saved
    own = {"rng": torch.full((rank + 1,), rank, dtype=torch.uint8), "name": f"rank {rank}", "sums": (rank, math.inf)}
    for step in (1, 2):
        state = {**checkpoint.training_state(model, optimizer), "drifting": drifting, "who": rank}
        checkpointer.save(step, state, own, asynchronous=step == 1)
        expected = full(state)
        for parameter in model.parameters():
            parameter.data.fill_(math.nan) if step == 2 else parameter.data.mul_(2.0)
        drifting.add_(100)
        # The collectives of the training continue during the save.
        for _ in range(20):
            total = torch.ones(1000)
            dist.all_reduce(total)
            assert total[0] == dist.get_world_size()
        if step == 1:
            checkpointer.wait()
    assert checkpointer.last is not None
    return expected if rank == 0 else None


def load_replicated(rank: int, group: dist.ProcessGroup, path: str) -> Any:
    model = DistributedDataParallel(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    content = checkpoint.restore_training(path, model, optimizer)
    return (
        full(checkpoint.training_state(model, optimizer)),
        content.own,
        content.state["drifting"],
        content.state["who"],
    )


def test_replicated_state_is_written_once_and_read_by_any_number_of_ranks(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    expected = run(3, save_replicated, str(directory), tmp_path=tmp_path)[0]
    newest = checkpoint.newest_intact(directory)
    assert newest.path == directory / "step-00000002"
    assert not newest.skipped
    for path in checkpoint.available(directory).values():
        assert sorted(file.name for file in path.glob("data-*")) == [f"data-0000{rank}.bin" for rank in range(3)]
        assert [(path / f"data-0000{rank}.bin").stat().st_size for rank in (1, 2)] == [2, 3]  # the state of each rank
    assert checkpoint.load(directory / "step-00000001").state["drifting"].tolist() == [0, 0, 0]
    for world_size in (1, 2):
        for state, own, drifting, who in run(world_size, load_replicated, str(newest.path), tmp_path=tmp_path):
            assert_equal(state, {key: expected[key] for key in ("model", "optimizer")})
            assert [entry["name"] for entry in own] == ["rank 0", "rank 1", "rank 2"]
            assert [entry["rng"].tolist() for entry in own] == [[0], [1, 1], [2, 2, 2]]
            assert [entry["sums"] for entry in own] == [(rank, math.inf) for rank in range(3)]
            assert (drifting.tolist(), who) == ([100, 100, 100], 0)


# --- sharded ---------------------------------------------------------------------------------------------------------


MATRIX = torch.arange(70.0).reshape(7, 10)


def sharded(world_size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh = init_device_mesh("cpu", (world_size,))
    model = net()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def placed(fill: torch.Tensor) -> dict[str, DTensor]:
    """Return a matrix in every layout over the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layouts = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}
    return {name: distribute_tensor(fill, mesh, [layout]) for name, layout in layouts.items()}


def save_sharded(rank: int, group: dist.ProcessGroup, source: str | None, directory: str, step: int) -> Any:
    """Resume from `source` if given, train a step, save, train another step; return the states."""
    model, optimizer = sharded(dist.get_world_size())
    loaded = None
    if source:
        checkpoint.restore_training(source, model, optimizer)
        loaded = full(checkpoint.training_state(model, optimizer))
        if "placed" in checkpoint.inspect(source).state:
            into = placed(torch.zeros(7, 10))
            into["rows"], into["columns"] = into["columns"], into["rows"]  # saved by rows, loaded by columns
            checkpoint.load(source, {"placed": into})
            assert all(torch.equal(tensor.full_tensor(), MATRIX) for tensor in into.values())
    train(model, optimizer, step)
    checkpointer = checkpoint.Checkpointer(directory, keep=9, group=group)
    state = checkpoint.training_state(model, optimizer)
    expected = full(state)
    checkpointer.save(step, {**state, "placed": placed(MATRIX)}, own=rank)
    train(model, optimizer, step + 1)
    checkpointer.close()
    return loaded, expected, full(checkpoint.training_state(model, optimizer))


def resume_sharded(rank: int, group: dist.ProcessGroup, source: str, step: int) -> Any:
    model, optimizer = sharded(dist.get_world_size())
    checkpoint.restore_training(source, model, optimizer)
    train(model, optimizer, step)
    return full(checkpoint.training_state(model, optimizer))


def test_sharded_state_is_resharded_from_2_to_3_to_1(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    two = run(2, save_sharded, None, str(directory), 1, tmp_path=tmp_path)
    first = directory / "step-00000001"
    _, at_first, after_first = two[0]
    sizes = [(first / f"data-0000{rank}.bin").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0.3 * max(sizes), "one rank wrote nearly all data"

    stored = json.loads((first / "metadata.json").read_text())["tensors"]
    assert {name: len(stored[f"placed/{name}"]["chunks"]) for name in ("rows", "columns", "replicated")} == {
        "rows": 2,
        "columns": 2,
        "replicated": 1,
    }

    # 2 -> 2: continues bit for bit.
    for resumed in run(2, resume_sharded, str(first), 2, tmp_path=tmp_path):
        assert_equal(resumed, after_first)
    # 2 -> 3.
    for loaded, _, _ in (three := run(3, save_sharded, str(first), str(directory), 2, tmp_path=tmp_path)):
        assert_equal(loaded, at_first)
    at_second = three[0][1]
    assert_equal(three[1][1], at_second)

    # 3 -> 1, and 2 -> 1: without a process group, into a plain model, and without a model.
    for path, expected in ((first, at_first), (directory / "step-00000002", at_second)):
        model = net()
        for parameter in model.parameters():
            parameter.data.zero_()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        checkpoint.restore_training(path, model, optimizer)
        assert_equal(full(checkpoint.training_state(model, optimizer)), expected)
        assert_equal(checkpoint.load_weights(path), expected["model"])

    # 1, plain -> 2, sharded.
    checkpoint.Checkpointer(directory, keep=9).save(3, checkpoint.training_state(model, optimizer), asynchronous=False)
    for loaded, _, _ in run(2, save_sharded, str(directory / "step-00000003"), str(directory), 4, tmp_path=tmp_path):
        assert_equal(loaded, at_second)


# --- failures --------------------------------------------------------------------------------------------------------


def fail_on_one(rank: int, group: dist.ProcessGroup, directory: str) -> tuple[str, int]:
    import resource

    checkpointer = checkpoint.Checkpointer(directory, group=group)
    checkpointer.save(1, {"n": 1}, own=torch.ones(10), asynchronous=False)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    checkpointer.save(2, {"n": 2}, own=torch.ones(1_000_000))
    try:
        checkpointer.wait()
        problem = ""
    except CheckpointError as error:
        problem = str(error)
    checkpointer.save(3, {"n": 3}, own=torch.ones(10))
    assert checkpointer.wait() is not None
    return problem, checkpointer.last.step  # type: ignore[union-attr]


def test_a_failure_of_one_rank_is_reported_by_all_and_leaves_no_files(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for problem, last in run(2, fail_on_one, str(directory), tmp_path=tmp_path):
        assert "step 2" in problem
        assert "rank 1: File too large" in problem
        assert "step-00000001 is intact" in problem
        assert last == 3
    assert [path.name for path in directory.iterdir()] == ["step-00000003"]


def die(rank: int, group: dist.ProcessGroup, directory: str) -> tuple[str, float]:
    checkpointer = checkpoint.Checkpointer(directory, group=group)
    checkpointer.save(1, {"n": 1}, asynchronous=False)
    if rank == 1:
        os._exit(9)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        checkpointer.save(2, {"n": 2}, own=torch.ones(1000), asynchronous=False)
    return str(caught.value), time.monotonic() - start


def test_a_dead_rank_does_not_block_the_others(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for problem, seconds in run(2, die, str(directory), tmp_path=tmp_path, dying=1):
        assert "step 2" in problem
        assert seconds < 100, "the collective would time out after 120"
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    checkpoint.verify(directory / "step-00000001")


def create_without_a_group(rank: int, group: dist.ProcessGroup, directory: str) -> None:
    with pytest.raises(ValueError, match="Checkpointer"):
        checkpoint.Checkpointer(directory)


def test_several_ranks_need_a_process_group(tmp_path: Path) -> None:
    run(2, create_without_a_group, str(tmp_path / "checkpoints"), tmp_path=tmp_path)
