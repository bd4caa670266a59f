"""The rank, device and process groups of one worker, and the collectives that the engine needs.

The rank and the world size are read from here and never from the process group, so that a runner may change them
between two steps (elastic training). The same code runs in one process, under torchrun or srun, and in Ray Train
workers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from launcher.engine import objects, rendezvous
from launcher.errors import ConfigError, ResourceError

COLLECTIVE_TIMEOUT = timedelta(seconds=120)


@dataclass
class Vote:
    """The result of a vote of all ranks on one step.

    Attributes:
        count: number of samples (tokens, …) in the loss of the global batch, on a GPU as a float64 scalar there.
        votes: the number of ranks that raised each flag.
    """

    count: torch.Tensor | float
    votes: dict[str, int]


@dataclass
class PendingVote:
    """A vote in progress: its collectives overlap with the backward pass."""

    names: tuple[str, ...]
    count: torch.Tensor | None  # on a GPU; on the CPU the count is the last entry of `flags`
    flags: torch.Tensor
    works: list[Any] = field(default_factory=list)

    def wait(self) -> Vote:
        """Wait for the collectives and return the result."""
        for work in self.works:
            work.wait()
        values = self.flags.tolist()
        count = values.pop() if self.count is None else self.count
        return Vote(count, {name: int(value) for name, value in zip(self.names, values, strict=True)})


@dataclass
class Runtime:
    """One rank: its numbers, its device and its process groups.

    Attributes:
        group: the process group for gradients and sums, or None for a single process.
        host_group: a gloo group for values that the host reads without synchronizing the device, or None.
        attempt: number of the group of workers within this command, from 1.
        cause: why this group was started after another one: "failure", "preemption" or "resize"; else empty.
        machines: number of machines that the run pays for, including the head and idle machines; 0 if unknown.
        apply: like `map`; reads the parts of a stream in order, possibly in other processes.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    host: str = field(default_factory=socket.gethostname)
    group: Any = None
    host_group: Any = None
    owns_group: bool = False
    attempt: int = 1
    cause: str = ""
    machines: int = 0
    apply: Callable[..., Iterator[Any]] = map
    _task_groups: list[Any] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.group is None

    # ---- construction -----------------------------------------------------------------------------------------------

    @classmethod
    def single(cls, device: str = "auto") -> Runtime:
        """Return the runtime of a single process."""
        return cls(0, 1, 0, 1, choose_device(device, 0))

    @classmethod
    def adopt(cls, rank: int, world_size: int, local_rank: int, local_world_size: int, device: str = "auto") -> Runtime:
        """Use the process group that the caller (Ray Train, a notebook, a test) has initialised."""
        runtime = cls(rank, world_size, local_rank, local_world_size, choose_device(device, local_rank))
        if dist.is_initialized():
            runtime.group = dist.group.WORLD
            backend = dist.get_backend()
            runtime.host_group = runtime.group if backend == "gloo" else dist.new_group(backend="gloo")
        return runtime

    @classmethod
    def from_environment(cls, facts: tuple[int, int, int, int], device: str = "auto") -> Runtime:
        """Join the ranks that torchrun or srun started, by MASTER_ADDR and MASTER_PORT, or use an existing process
        group.

        Args:
            facts: rank, world size, local rank, local world size; see `ranks_in_environment`.
        """
        rank, world_size, local_rank, local_world_size = facts
        owns = not dist.is_initialized()
        if owns:
            on_gpu = choose_device(device, local_rank).type == "cuda"
            if local_world_size == world_size:
                rendezvous.stay_on_loopback()
            store = rendezvous.of_environment(rank, world_size, COLLECTIVE_TIMEOUT, local_world_size == world_size)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE_TIMEOUT,
            )
        runtime = cls.adopt(rank, world_size, local_rank, local_world_size, device)
        runtime.owns_group = owns
        return runtime

    def close(self) -> None:
        """Destroy the process group, if this runtime created it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.group = self.host_group = None

    # ---- collectives ------------------------------------------------------------------------------------------------

    def vote(self, count: torch.Tensor | float, flags: dict[str, bool]) -> PendingVote:
        """Start to sum `count` and the flags over all ranks. `PendingVote.wait` returns the result.

        On the CPU both are in one tensor. With a GPU the count stays on the device, and the flags are reduced with
        gloo, so that reading them does not synchronize the device.
        """
        names = tuple(flags)
        values = [float(value) for value in flags.values()]
        if self.device.type == "cpu":
            # NumPy turns a list into numbers in a third of torch's time; each step does it.
            both = torch.from_numpy(np.array([*values, float(count)]))
            pending = PendingVote(names, None, both)
            if not self.alone:
                pending.works = [dist.all_reduce(both, group=self.group, async_op=True)]
            return pending
        on_device = torch.zeros((), dtype=torch.float64, device=self.device).add_(count)
        pending = PendingVote(names, on_device, torch.tensor(values, dtype=torch.float64))
        if not self.alone:
            pending.works = [
                dist.all_reduce(on_device, group=self.group, async_op=True),
                dist.all_reduce(pending.flags, group=self.host_group, async_op=True),
            ]
        return pending

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor`, on the device or on the host, over all ranks, in place. Return it."""
        if not self.alone:
            dist.all_reduce(tensor, group=self.group_of(tensor))
        return tensor

    def group_of(self, tensor: torch.Tensor) -> Any:
        """Return the process group for a tensor, by its device."""
        return self.host_group if tensor.device.type == "cpu" else self.group

    def gather(self, value: Any) -> list[Any]:
        """Return the plain Python `value` of every rank, by rank; see `objects` for the supported types."""
        return [value] if self.alone else objects.all_gather(value, self.host_group)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's plain Python `value`; see `objects` for the supported types."""
        return value if self.alone else objects.broadcast(value, self.host_group)

    def new_host_group(self) -> Any:
        """Create a gloo group over all ranks for background work (saving); return None for a single process."""
        if self.alone:
            return None
        self._task_groups.append(dist.new_group(backend="gloo"))
        return self._task_groups[-1]

    def end_task(self) -> None:
        """Destroy the groups that a task has created, so that the next task can use the same processes."""
        while self._task_groups:
            dist.destroy_process_group(self._task_groups.pop())

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        if not self.alone:
            dist.barrier(group=self.host_group)


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of a worker. `auto` selects the worker's GPU if there is one; `cuda:1` selects that GPU.

    Raises:
        ResourceError: a GPU is requested and none is available.
    """
    available = torch.cuda.is_available()
    if device.startswith("cuda") and not available:
        raise ResourceError(
            f"scaling.device={device} needs a GPU, but PyTorch finds no usable GPU on this machine. "
            "Use scaling.device=auto or cpu, or check the driver with nvidia-smi."
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    # CUDA_VISIBLE_DEVICES may show each process only its own GPU, regardless of its local rank.
    chosen = torch.device(device if ":" in device else f"cuda:{local_rank % torch.cuda.device_count()}")
    torch.cuda.set_device(chosen)
    return chosen


def ranks_in_environment(environment: dict[str, str] | None = None) -> tuple[int, int, int, int] | None:
    """Return (rank, world size, local rank, local world size) if torchrun or srun started this process, else None.

    torchrun: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables. srun: `man srun`, OUTPUT
    ENVIRONMENT VARIABLES. Only a job step sets SLURM_STEP_NUM_TASKS; a shell in an allocation does not.
    """
    env = cast("dict[str, str]", os.environ) if environment is None else environment
    if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= env.keys():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        defaults = ("0", "1", "0", "1")
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        defaults = ("0", "1", "0", "1")
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ConfigError(
                f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks, but MASTER_ADDR or MASTER_PORT is not set. Export "
                "both before srun: MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) "
                "MASTER_PORT=29500."
            )
    else:
        return None
    rank, world, local_rank, local_world = (
        env.get(name, default) for name, default in zip(names, defaults, strict=True)
    )
    # SLURM writes tasks per node as "4(x2),3". The first number is sufficient: it only sets this node's threads.
    return int(rank), int(world), int(local_rank), int(local_world.split("(")[0].split(",")[0])
