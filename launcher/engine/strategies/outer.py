"""The outer optimizer of workers that train apart: what they do where they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from launcher.engine.runtime import Runtime


class OuterOptimizer:
    """Local SGD (Stich 2018) and DiLoCo (Douillard et al. 2023, algorithm 1), as hooks of any inner optimizer.

    Every `every` steps, with θ what the workers agree on and θᵢ the weights of worker i:

        Δ = mean over i of (θ - θᵢ)        all-reduced in `wire`
        m ← μ m + Δ
        θ ← θ - lr (Δ + μ m)               Nesterov, as torch.optim.SGD has it; lr = 1 and μ = 0 is the mean of the θᵢ
        θᵢ ← θ

    With `delay`, the workers train on while Δ travels, so many steps, and what they have moved since is added:
    θᵢ ← θ + (θᵢ now - θᵢ then). After the last step of the run nothing is left on its way and all hold θ.

    It counts and meets behind every `step` of the inner optimizer, so each worker has to call that as often as the
    others: one that has nothing to apply calls it without gradients.

    Args:
        inner: what is hooked; nothing else of it is used.
        replica: this worker's weights, which the inner optimizer changes in place.
        delay: steps, less than `every`.
        wire: None for that of the weights, float32 at least.
        met: called on every worker when θ has changed.

    Attributes:
        weights: θ, in the order of `replica`; what is evaluated, saved and exported. Complex ones as pairs of numbers.
        momentum: m, likewise.
        steps: inner steps so far, the same on every worker.
    """

    def __init__(
        self,
        inner: Optimizer,
        replica: Sequence[Tensor],
        runtime: Runtime,
        *,
        every: int,
        lr: float = 1.0,
        momentum: float = 0.0,
        delay: int = 0,
        wire: torch.dtype | None = None,
        total_steps: int | None = None,
        met: Callable[[], None] | None = None,
    ) -> None:
        self._replica: list[Tensor] = [_as_real(tensor.detach()) for tensor in replica]
        self._runtime, self._every, self._lr, self._mu = runtime, every, lr, momentum
        self._delay, self._wire, self._total, self._met = delay, wire, total_steps, met
        self.steps = 0
        self._shown = [tensor.detach().clone() for tensor in replica]
        self.weights = [_as_real(tensor) for tensor in self._shown]
        self.momentum = [torch.zeros_like(tensor) for tensor in self._replica] if momentum else []
        self._sent: list[Tensor] = []  # the replica as it was when Δ was sent
        self._delta: Tensor | None = None  # on its way, or arrived and not yet used
        self._work: Any = None
        inner.register_step_pre_hook(self._before)
        inner.register_step_post_hook(self._after)

    def _before(self, inner: Optimizer, args: Any, kwargs: Any) -> None:
        """Begin with the replica's weights, the same on every worker: they may have been loaded since it was made."""
        if not self.steps:
            torch._foreach_copy_(self.weights, self._replica)

    def _after(self, inner: Optimizer, args: Any, kwargs: Any) -> None:
        """Count an inner step, and meet where it is time."""
        self.steps += 1
        last = self.steps == self._total
        due = self.steps % self._every == 0
        if self._delta is not None and (last or self.steps % self._every == self._delay):
            self._receive()
        if due or last:
            self._send()
            if not self._delay or last:
                self._receive()

    def _send(self) -> None:
        delta = torch._foreach_sub(self.weights, self._replica)
        flat = torch.cat([part.reshape(-1) for part in delta]).div_(self._runtime.world_size)
        self._delta = flat.to(self._wire or torch.promote_types(flat.dtype, torch.float32))
        if self._delay:
            self._sent = [tensor.clone() for tensor in self._replica]
        if not self._runtime.alone:
            self._work = dist.all_reduce(self._delta, group=self._runtime.group, async_op=True)

    def _receive(self) -> None:
        moved = list(torch._foreach_sub(self._replica, self._sent)) if self._sent else []
        self._update(self._arrived())
        torch._foreach_copy_(self._replica, self.weights)
        if moved:
            torch._foreach_add_(self._replica, moved)
        self._sent, self._delta = [], None
        if self._met is not None:
            self._met()

    def _arrived(self) -> Tensor:
        """Return Δ, waiting for it where it is on its way."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        assert self._delta is not None
        return self._delta

    def _update(self, flat: Tensor) -> None:
        parts = flat.split([weight.numel() for weight in self.weights])
        delta = [part.view(w.shape).to(w.dtype) for part, w in zip(parts, self.weights, strict=True)]
        if self.momentum:
            torch._foreach_mul_(self.momentum, self._mu)
            torch._foreach_add_(self.momentum, delta)
            delta = list(torch._foreach_add(delta, self.momentum, alpha=self._mu))
        torch._foreach_sub_(self.weights, delta, alpha=self._lr)

    @contextmanager
    def shown(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside, `parameters` (of which `replica` is the data) hold θ."""
        held = [parameter.data for parameter in parameters]
        for parameter, weight in zip(parameters, self._shown, strict=True):
            parameter.data = weight
        try:
            yield
        finally:
            for parameter, tensor in zip(parameters, held, strict=True):
                parameter.data = tensor

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what all workers share, but for θ, which are the weights of the checkpoint."""
        return {
            "steps": self.steps,
            "momentum": list(self.momentum),
            "arriving": None if self._delta is None else self._arrived(),
        }

    def own_state_dict(self) -> dict[str, Any]:
        return {"replica": list(self._replica), "sent": list(self._sent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint whose weights the replica holds already."""
        self.steps = state["steps"]
        torch._foreach_copy_(self.weights, self._replica)
        if self.momentum:
            torch._foreach_copy_(self.momentum, [tensor.to(self._device) for tensor in state["momentum"]])
        arriving = state["arriving"]
        self._delta = None if arriving is None else arriving.to(self._device)
        self._work = None

    def load_own_state_dicts(self, states: Sequence[Mapping[str, Any]], resized: bool) -> None:
        """Take this worker's replica; or, with another number of workers, meet: see `_meet`."""
        if not resized:
            (state,) = states
            torch._foreach_copy_(self._replica, [tensor.to(self._device) for tensor in state["replica"]])
            self._sent = [
                torch.empty_like(own).copy_(sent) for own, sent in zip(self._replica, state["sent"], strict=False)
            ]
            return
        self._meet(states)

    def _meet(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Do what the workers that there were would have done had they met when the checkpoint was written.

        Every worker computes it alike from the replicas in the checkpoint, and all go on from θ.
        """
        replicas = [[tensor.to(self._device) for tensor in state["replica"]] for state in states]
        if self._delta is not None:
            self._update(self._delta)
            for replica, state in zip(replicas, states, strict=True):
                moved = torch._foreach_sub(replica, [tensor.to(self._device) for tensor in state["sent"]])
                torch._foreach_copy_(replica, torch._foreach_add(self.weights, moved))
            self._delta = None
        if any(not torch.equal(a, b) for replica in replicas for a, b in zip(replica, self.weights, strict=True)):
            total = torch.zeros((), device=self._device)
            for replica in replicas:
                delta = torch._foreach_sub(self.weights, replica)
                total = total + torch.cat([part.reshape(-1) for part in delta])
            self._update(total / len(replicas))
        torch._foreach_copy_(self._replica, self.weights)
        self._sent = []

    @property
    def _device(self) -> torch.device:
        return self._replica[0].device


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
