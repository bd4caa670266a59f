"""Data parallelism with PyTorch's DistributedDataParallel, the default strategy."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from launcher.config import StrategyConfig, TrainerConfig
from launcher.engine.preserve import preserve_model
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.strategies.compression import WIRE, cast_hook
from launcher.engine.strategies.kinds.base import option
from launcher.engine.strategies.sparse import (
    average,
    coalesce,
    dense_parts,
    has_sparse_gradient,
    refuse_mixed,
    refuse_sparse,
)
from launcher.engine.strategies.strategy import Record, Strategy, loss_of, mark_last, scale_by_count
from launcher.errors import UserCodeError


class DataParallel(Strategy):
    """All-reduces gradient buckets during the backward pass.

    DDP divides by the number of workers. Each worker multiplies the *sum* of its losses by workers / samples of the
    global batch, so the result is the sum over all samples divided by their number. If the loss counts tokens or
    weights instead of samples, the gradients are scaled once more when the global count is known.
    """

    # Whether DDP reduces the gradients; False in subclasses that combine them in another way.
    wraps = True

    def __init__(
        self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig, config: StrategyConfig | None = None
    ) -> None:
        super().__init__(model, runtime, trainer)
        self._config = config or StrategyConfig()
        self._seed = trainer.seed
        self._wrapped: nn.Module = self._steps
        self._keeps_gradients = False
        self._views: list[tuple[nn.Parameter, torch.Tensor]] = []  # views of DDP's buckets, for the first step
        self._weight: tuple[float, torch.Tensor] | None = None
        self._idle = False  # whether this rank had no sample of the last batch

    @property
    def reduces_while_computing(self) -> bool:  # type: ignore[override]
        return self.wraps

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.wraps

    def prepare(self, batch: Any) -> dict[str, Any]:
        self._broadcast()
        return self._wrap(batch)

    def rewrap(self, batch: Any) -> None:
        self._wrapped = self._steps
        for parameter in self._parameters:
            parameter.grad = None  # a view of the buckets of the previous wrapper
        gc.collect()  # the previous wrapper and its hooks are part of reference cycles
        self._keeps_gradients = False
        self._wrap(batch)

    def _wrap(self, batch: Any) -> dict[str, Any]:
        self._views = []
        with preserve_model(self.model, self.runtime.device):
            answer = self._warm_up(self._steps, batch)
            self._steps.used = [p for p in self._parameters if p.grad is not None]
            self.uses_all = all(p.grad is not None for p in self._parameters if p.requires_grad)
            self.sparse = [p for p in self._parameters if has_sparse_gradient(p)]
            self._choose_needed()
            refuse_mixed(self.model)
            if self._config.compression != "none":
                refuse_sparse(self.sparse, f"strategy.compression={self._config.compression}")
            if self.wraps and not self.runtime.alone:
                self._keeps_gradients = self.uses_all and not self.sparse
                self._wrapped = self._in_ddp()
                super()._clear()
                # DDP rebuilds its buckets after the first backward pass. With this warm-up, a resumed run reduces in
                # the same order as an uninterrupted run; otherwise the sums of three or more workers would differ.
                self._warm_up(self._wrapped, batch)
                self._views = [(p, p.grad) for p in self._parameters if p.grad is not None]
        return answer

    def _in_ddp(self) -> nn.Module:
        """Wrap the steps in DDP. Sparse gradients are reduced by `_combine`, because NCCL cannot reduce them."""
        sparse = {id(p) for p in self.sparse}
        if all(id(p) in sparse for p in self._parameters if p.requires_grad):
            return self._steps
        ignored = [name for name, p in self._steps.named_parameters(remove_duplicate=False) if id(p) in sparse]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._steps, ignored)
        static = bool(option(self._config, "static_graph"))
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; older supported versions lack the new name.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                self._steps,
                device_ids=None,  # batches are on the device already; with device_ids DDP would rebuild containers
                process_group=self.runtime.group,
                init_sync=False,  # `prepare` has broadcast the parameters already
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
                bucket_cap_mb=option(self._config, "bucket_mb"),
                find_unused_parameters=not self.uses_all and not static,
                static_graph=static,
            )
        if self._config.compression in WIRE:
            wrapped.register_comm_hook(self.runtime, cast_hook(WIRE[self._config.compression]))
        return wrapped

    def _clear(self) -> None:
        """Clear the gradients. If every parameter gets one in each step, zero them in place, as views of DDP's buckets.

        Otherwise a parameter that a global batch does not use must have no gradient: with zeros the optimizer would
        apply weight decay.
        """
        if self._views and self._keeps_gradients:
            # DDP divides gradients that are views of its buckets, but multiplies those it has to copy. Without the
            # views the first step after a resume would round differently from the same step of an uninterrupted run.
            for parameter, view in self._views:
                parameter.grad = view
            self._views = []
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if grads and self._keeps_gradients:
            torch._foreach_zero_(grads)
            return
        super()._clear()

    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        self._clear()
        total: torch.Tensor | float = 0.0
        weight = self.runtime.world_size / size
        pending = None
        for batch, last in mark_last(batches):
            self._idle = batch is None
            wrapped = self._wrapped
            quiet = wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()
            with quiet:
                with self.cast():
                    answer = wrapped(batch)
                loss, count = loss_of(answer)
                total = total + (count.double() if isinstance(count, torch.Tensor) else count)
                if self._is_bad(loss):
                    flags["bad"] = True
                if last:
                    pending = self.runtime.vote(total, flags)
                scaled = self._scaler.scale(loss)
                scaled.backward(self._weight_of(scaled, weight))
            if last:
                self._require_all_gradients()
            if batch is not None:
                record({**answer, "loss": (loss.detach(), count)})
        assert pending is not None
        return pending.wait()

    def _weight_of(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """Return the gradient of `weight * loss` with respect to `loss`, which saves computing the product."""
        known = self._weight
        if known is None or (known[0], known[1].dtype) != (weight, loss.dtype):
            known = self._weight = (weight, torch.full_like(loss.detach(), weight))
        return known[1]

    def _require_all_gradients(self) -> None:
        """Raise if this rank lacks a gradient that other ranks wait for, before its next collective is mistaken for it.

        Raises:
            UserCodeError: this batch does not use a parameter that the first batch used.
        """
        if not isinstance(self._wrapped, DistributedDataParallel):
            return
        try:
            self._wrapped._check_reducer_finalized()
        except RuntimeError as error:
            raise UserCodeError(
                "training_step used parameters in the first batch that it does not use in this one, so the workers "
                "cannot reduce their gradients. Use every parameter in every batch (add 0 * parameter.sum() to the "
                "loss), or train with trainer.deterministic=true, which allows unused parameters.",
                "",
            ) from error

    def apply(self, optimizer: Optimizer, size: int, vote: Vote) -> None:
        coalesce(self.sparse)
        self._scaler.unscale_(optimizer)
        scale_by_count(dense_parts(p.grad for p in self._parameters if p.grad is not None), size, vote.count)
        self._combine(optimizer)
        self._clip_and_step(optimizer, [p.grad for p in self.optimized if p.grad is not None])
        if not self.uses_all:
            self._steps.used = [p for p in self._steps.used if p.grad is not None] or self._steps.used
            self._choose_needed()

    def _choose_needed(self) -> None:
        """Choose the parameters for which a rank without samples computes a zero gradient.

        If batches use different parameters, this is one that every batch so far has used and that DDP waits for. With
        a zero gradient in a parameter that no other rank uses, the optimizer would update it.
        """
        used, sparse = self._steps.used, {id(p) for p in self.sparse}
        self._steps.needed = used if self.uses_all else ([p for p in used if id(p) not in sparse] or used)[:1]

    def _combine(self, optimizer: Optimizer) -> None:
        """Average those gradients over the ranks that the backward pass has not averaged."""
        if self.wraps and self.sparse and not self.runtime.alone:
            self._agree_on_overflow(optimizer)
            average(self.sparse, self.runtime)
