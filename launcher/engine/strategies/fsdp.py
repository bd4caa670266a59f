"""Fully sharded data parallelism with PyTorch's `fully_shard` (FSDP2), for networks that do not fit on one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from launcher.config import StrategyConfig, TrainerConfig
from launcher.engine.order import Split
from launcher.engine.preserve import preserve_model
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.strategies.blocks import blocks_of, check_divisible
from launcher.engine.strategies.compression import WIRE
from launcher.engine.strategies.kinds.base import option
from launcher.engine.strategies.strategy import Record, Strategy, all_finite, loss_of, multiply, scale_by_count
from launcher.errors import ConfigError


class FullySharded(Strategy):
    """Shards parameters, gradients and optimizer state over the workers, along the first dimension of each tensor.

    Each block is gathered when it computes; the rest of the network is gathered for the whole step. The gradients of a
    block are reduced and scattered in every microbatch, so only shards are accumulated.

    With a 16-bit `trainer.precision`, weights are sent in that dtype and stored in float32; gradients are sent in
    float32, or in the dtype of `strategy.compression`. With `hybrid`, parameters are sharded within a machine and
    replicated across machines: weights are sent only within a machine, and of the gradients each worker sends its shard
    to other machines.

    Every forward pass is a collective, so all workers run as many as the worker with the most microbatches.
    """

    shares_gradients = False

    def __init__(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig, split: Split
    ) -> None:
        super().__init__(model, runtime, trainer)
        self._config, self._split = config, split
        self._spare: Any = None  # a batch for rounds in which this rank has no microbatch
        self._parts: list[FSDPModule] = []
        check_divisible(model, config.blocks)
        if option(config, "cpu_offload") and runtime.device.type == "cpu":
            raise ConfigError(
                "strategy.cpu_offload=true moves parameters from GPUs to host memory, but the workers compute on CPUs. "
                "Remove the option.",
                key="strategy.cpu_offload",
            )

    def prepare(self, batch: Any) -> dict[str, Any]:
        self._broadcast()
        self._shard()
        self._parameters = list(self.model.parameters())  # DTensors now
        self._spare = batch
        with preserve_model(self.model, self.runtime.device):
            answer = self._warm_up(self._steps, batch)
            self.uses_all = all(p.grad is not None for p in self._parameters if p.requires_grad)
        return answer

    def _shard(self) -> None:
        runtime, config = self.runtime, self._config
        mesh = self._mesh()
        computes = None if self._precision is torch.float32 else self._precision
        double = any(p.dtype is torch.float64 for p in self.model.parameters())
        reduces = WIRE.get(config.compression, None if double else torch.float32)
        offload = CPUOffloadPolicy(pin_memory=runtime.device.type == "cuda")
        how: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=reduces, cast_forward_inputs=False),
            "offload_policy": offload if option(config, "cpu_offload") else OffloadPolicy(),
        }
        for parameter in self.model.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 does not support channels-last weights
        blocks = blocks_of(self.model, config.blocks)
        for block in blocks:
            fully_shard(block, **how)
        # The other parameters are needed at both ends of the network, so they stay gathered until the backward pass.
        fully_shard(self._steps, reshard_after_forward=False, **how)
        self._parts = [module for module in self._steps.modules() if isinstance(module, FSDPModule)]
        for part in self._parts:
            # Sums, because gradients are divided by the count of the global batch. gloo supports no other reduction.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self._norm_group = runtime.group if mesh.ndim == 1 else mesh["shard"].get_group()
        if option(config, "cpu_offload"):
            self._norm_group = runtime.host_group

    def _mesh(self) -> DeviceMesh:
        runtime = self.runtime
        if not option(self._config, "hybrid"):
            return DeviceMesh.from_group(runtime.group, runtime.device.type)
        local, total = runtime.local_world_size, runtime.world_size
        if local < 2 or total == local or total % local:
            raise ConfigError(
                f"strategy.hybrid=true shards the network within each machine and replicates it across machines, but "
                f"there are {total} workers in all and {local} on this machine. Use several machines with the same "
                "number of workers, at least two, on each; or remove the option.",
                key="strategy.hybrid",
            )
        if option(self._config, "cpu_offload"):
            raise ConfigError(
                "strategy.hybrid=true cannot be combined with strategy.cpu_offload=true. Choose one.",
                key="strategy.hybrid",
            )
        return dist.init_device_mesh(
            runtime.device.type, (total // local, local), mesh_dim_names=("replicate", "shard")
        )

    def call(self, method: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        return self._steps(batch, method)

    @contextmanager
    def evaluation_weights(self) -> Iterator[dict[str, torch.Tensor]]:
        with super().evaluation_weights() as own:
            try:
                yield own
            finally:
                for part in self._parts:
                    part.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        for part in self._parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in self._parts:
                part.set_reshard_after_forward(part is not self._steps, recurse=False)
                part.reshard()

    def idle_rounds(self, split: Split, length: int) -> int:
        if not self._parts:
            return 0
        world_size = self.runtime.world_size
        rounds = [len(split.share(length, rank, world_size)) for rank in range(world_size)]
        return max(rounds) - rounds[self.runtime.rank]

    def drawable(self) -> nn.Module | None:
        return None

    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        self._clear()
        total: torch.Tensor | float = 0.0
        for batch in batches:
            with self.cast():
                answer = self._steps(batch)
            loss, count = loss_of(answer)
            total = total + (count.double() if isinstance(count, torch.Tensor) else count)
            if self._is_bad(loss):
                flags["bad"] = True
            self._scaler.scale(loss / size).backward()
            record({**answer, "loss": (loss.detach(), count)})
        for _ in range(self.idle_rounds(self._split, size)):
            with self.cast():
                loss, _ = loss_of(self._steps(self._spare))
            (loss * 0.0).backward()
        return self.runtime.vote(total, flags).wait()

    def apply(self, optimizer: Optimizer, size: int, vote: Vote) -> None:
        self._scaler.unscale_(optimizer)
        self._agree_on_overflow(optimizer)
        grads = self._grads()
        scale_by_count(grads, size, vote.count)
        if self.clip_norm is not None:
            self._norm = self._total_norm(grads)
            multiply(grads, (self.clip_norm / (self._norm + 1e-6)).clamp(max=1.0))
        self._scaler.step(optimizer)
        self._scaler.update()

    def _grads(self) -> list[torch.Tensor]:
        """Return this worker's shards of the gradients."""
        grads = [p.grad for p in self.optimized if p.grad is not None]
        return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]

    def _total_norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        present = [grad for grad in grads if grad.numel()]
        device = grads[0].device if grads else self.runtime.device
        squares = torch.zeros(1, dtype=torch.float64, device=device)
        if present:
            squares += torch.stack(torch._foreach_norm(present)).double().square().sum()
        dist.all_reduce(squares, group=self._norm_group)
        return squares.sqrt().squeeze(0)

    def replicated(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        return []  # each worker has a different shard

    def grad_norm(self) -> torch.Tensor:
        return self._norm if self.clip_norm is not None else self._total_norm(self._grads())

    def is_finite(self) -> bool:
        parts = [p.detach() for p in self._parameters]
        return self._on_every_rank(all_finite(p.to_local() if isinstance(p, DTensor) else p for p in parts))
