"""The facts of one rank, and the few collectives that the engine needs.

Rank facts come from here and never from the process group, so that a runner may change them between two steps
(elastic training). The same code runs alone, under torchrun or srun, and inside Ray Train workers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from launcher.engine import objects, rendezvous
from launcher.errors import ConfigError, ResourceError

COLLECTIVE_TIMEOUT = timedelta(seconds=120)


@dataclass
class Vote:
    """What all ranks together know of one step.

    `count`: samples (tokens, …) behind the loss of the global batch, a float64 scalar on the device.
    `votes`: how many ranks raised each flag.
    """

    count: torch.Tensor
    votes: dict[str, int]


@dataclass
class PendingVote:
    """A vote on its way: the collectives run while the backward pass does."""

    names: tuple[str, ...]
    count: torch.Tensor
    flags: torch.Tensor
    works: list[Any] = field(default_factory=list)

    def wait(self) -> Vote:
        for work in self.works:
            work.wait()
        raised = self.flags.tolist()
        return Vote(self.count, {name: int(value) for name, value in zip(self.names, raised, strict=True)})


@dataclass
class Runtime:
    """One rank: who it is, where it computes, and whom it talks to.

    `group` carries gradients and sums; `host_group` (gloo) carries what the host must read without stopping the device.
    Both are None when the rank is alone.
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
    attempt: int = 1  # which group of workers of this command it belongs to
    cause: str = ""  # why that group was started after another: "failure", "preemption" or "resize"
    machines: int = 0  # that the run is paid for, those without a worker of its and the head too; 0: nobody counted
    apply: Callable[..., Iterator[Any]] = map  # what reads the parts of a stream, here or elsewhere, in their order
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
        """This process alone."""
        return cls(0, 1, 0, 1, choose_device(device, 0))

    @classmethod
    def adopt(cls, rank: int, world_size: int, local_rank: int, local_world_size: int, device: str = "auto") -> Runtime:
        """Use the process group that somebody (Ray Train, a notebook, a test) has initialised."""
        runtime = cls(rank, world_size, local_rank, local_world_size, choose_device(device, local_rank))
        if dist.is_initialized():
            runtime.group = dist.group.WORLD
            backend = dist.get_backend()
            runtime.host_group = runtime.group if backend == "gloo" else dist.new_group(backend="gloo")
        return runtime

    @classmethod
    def from_environment(cls, facts: tuple[int, int, int, int], device: str = "auto") -> Runtime:
        """Join the ranks that torchrun or srun started, by MASTER_ADDR and MASTER_PORT. A group that exists is adopted.

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
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.group = self.host_group = None

    # ---- collectives ------------------------------------------------------------------------------------------------

    def vote(self, count: torch.Tensor | float, flags: dict[str, bool]) -> PendingVote:
        """Start to add up `count` and the flags of all ranks; read the outcome with `wait`.

        On the CPU one tensor carries both; with a GPU the count stays on the device and the flags travel over gloo, so
        that reading them stops nothing.
        """
        names = tuple(flags)
        values = [float(value) for value in flags.values()]
        if self.device.type == "cpu":
            both = torch.tensor([float(count), *values], dtype=torch.float64)
            pending = PendingVote(names, both[0], both[1:])
            if not self.alone:
                pending.works = [dist.all_reduce(both, group=self.group, async_op=True)]
            return pending
        on_device = torch.zeros((), dtype=torch.float64, device=self.device).add_(count)
        pending = PendingVote(names, on_device, torch.tensor(values, dtype=torch.float64))
        if not self.alone:
            pending.works = [
                dist.all_reduce(pending.count, group=self.group, async_op=True),
                dist.all_reduce(pending.flags, group=self.host_group, async_op=True),
            ]
        return pending

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor`, on the device or on the host, over all ranks, in place."""
        if not self.alone:
            dist.all_reduce(tensor, group=self.group_of(tensor))
        return tensor

    def group_of(self, tensor: torch.Tensor) -> Any:
        """Return the group that carries a tensor where it is."""
        return self.host_group if tensor.device.type == "cpu" else self.group

    def gather(self, value: Any) -> list[Any]:
        """Return the plain Python `value` of every rank, by rank; see `objects` for what it may be."""
        return [value] if self.alone else objects.all_gather(value, self.host_group)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's plain Python `value`; see `objects` for what it may be."""
        return value if self.alone else objects.broadcast(value, self.host_group)

    def new_host_group(self) -> Any:
        """Return a gloo group of its own over all ranks, for work beside the training (saving), or None when alone."""
        if self.alone:
            return None
        self._task_groups.append(dist.new_group(backend="gloo"))
        return self._task_groups[-1]

    def end_task(self) -> None:
        """Give back the groups that a task has made, so that the next one may begin in the same processes."""
        while self._task_groups:
            dist.destroy_process_group(self._task_groups.pop())

    def barrier(self) -> None:
        if not self.alone:
            dist.barrier(group=self.host_group)


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of a worker. `auto` is this worker's GPU where there is one; `cuda:1` is that very one.

    Raises:
        ResourceError: a GPU was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device.startswith("cuda") and not available:
        raise ResourceError(
            f"scaling.device={device} was asked for, and PyTorch finds no usable GPU here. "
            "Use scaling.device=auto or cpu, or check the driver with nvidia-smi."
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    # CUDA_VISIBLE_DEVICES may show each process its own GPU alone, whatever its local rank.
    chosen = torch.device(device if ":" in device else f"cuda:{local_rank % torch.cuda.device_count()}")
    torch.cuda.set_device(chosen)
    return chosen


def ranks_in_environment(environment: dict[str, str] | None = None) -> tuple[int, int, int, int] | None:
    """Return (rank, world size, local rank, local world size) when torchrun or srun started this process, else None.

    torchrun: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables. srun: `man srun`, OUTPUT
    ENVIRONMENT VARIABLES; only a job step sets SLURM_STEP_NUM_TASKS, so a shell within an allocation is not one.
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
                f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks, and MASTER_ADDR or MASTER_PORT is not set. Export "
                "both before srun: MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) "
                "MASTER_PORT=29500."
            )
    else:
        return None
    rank, world, local_rank, local_world = (
        env.get(name, default) for name, default in zip(names, defaults, strict=True)
    )
    # SLURM writes tasks per node as "4(x2),3"; the first number serves, since it only sizes this node's threads.
    return int(rank), int(world), int(local_rank), int(local_world.split("(")[0].split(",")[0])
