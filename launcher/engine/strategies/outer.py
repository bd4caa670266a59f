"""The outer optimizer of local SGD and DiLoCo, which synchronizes workers that train independently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from launcher.engine.runtime import Runtime
from launcher.engine.tensors import as_real


class OuterOptimizer:
    """Local SGD (Stich 2018) and DiLoCo (Douillard et al. 2023, algorithm 1), as hooks of any inner optimizer.

    Every `every` steps, with the shared weights θ and the weights θᵢ of worker i:

        Δ = mean over i of (θ - θᵢ)        all-reduced in the dtype `wire`
        m ← μ m + Δ
        θ ← θ - lr (Δ + μ m)               Nesterov momentum as in torch.optim.SGD; lr = 1, μ = 0 is the mean of the θᵢ
        θᵢ ← θ

    With `delay`, the workers continue to train for that many steps during the all-reduce of Δ. Then the change of their
    weights since its start is added: θᵢ ← θ + (θᵢ now - θᵢ at the start). After the last step of the run all workers
    hold θ, and no all-reduce is pending.

    The hooks run after every `step` of the inner optimizer, so all workers must call it equally often: a worker that
    has nothing to apply calls it without gradients.

    Args:
        inner: the optimizer to hook.
        replica: this worker's weights, which the inner optimizer updates in place.
        every: number of inner steps between two synchronizations.
        delay: number of steps, less than `every`.
        wire: dtype of the all-reduce; None for the dtype of the weights, at least float32.
        total_steps: length of the run; None if unknown.
        synchronized: called on every worker after θ has changed.

    Attributes:
        weights: θ, in the order of `replica`; evaluated, saved and exported. Complex weights are pairs of real numbers.
        momentum: m, in the same form.
        steps: number of inner steps so far, equal on all workers.
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
        synchronized: Callable[[], None] | None = None,
    ) -> None:
        self._replica: list[Tensor] = [as_real(tensor.detach()) for tensor in replica]
        self._runtime, self._every, self._lr, self._mu = runtime, every, lr, momentum
        self._delay, self._wire, self._total, self._synchronized = delay, wire, total_steps, synchronized
        self.steps = 0
        self._shown = [tensor.detach().clone() for tensor in replica]
        self.weights = [as_real(tensor) for tensor in self._shown]
        self.momentum = [torch.zeros_like(tensor) for tensor in self._replica] if momentum else []
        self._sent: list[Tensor] = []  # a copy of the replica at the start of the all-reduce of Δ
        self._delta: Tensor | None = None  # Δ during its all-reduce, and until it is applied
        self._work: Any = None
        inner.register_step_pre_hook(self._before)
        inner.register_step_post_hook(self._after)

    def _before(self, inner: Optimizer, args: Any, kwargs: Any) -> None:
        """Initialize θ before the first step: the replica's weights may have been loaded after construction."""
        if not self.steps:
            torch._foreach_copy_(self.weights, self._replica)

    def _after(self, inner: Optimizer, args: Any, kwargs: Any) -> None:
        """Count an inner step, and synchronize if it is due."""
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
        self._update(self._reduced_delta())
        torch._foreach_copy_(self._replica, self.weights)
        if moved:
            torch._foreach_add_(self._replica, moved)
        self._sent, self._delta = [], None
        if self._synchronized is not None:
            self._synchronized()

    def _reduced_delta(self) -> Tensor:
        """Return Δ, after waiting for its all-reduce."""
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
        """Within this context, `parameters` hold θ. `replica` must be their data."""
        own = [parameter.data for parameter in parameters]
        for parameter, weight in zip(parameters, self._shown, strict=True):
            parameter.data = weight
        try:
            yield
        finally:
            for parameter, tensor in zip(parameters, own, strict=True):
                parameter.data = tensor

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state that all workers share, without θ: the checkpoint has θ as its weights."""
        return {
            "steps": self.steps,
            "momentum": list(self.momentum),
            "arriving": None if self._delta is None else self._reduced_delta(),
        }

    def own_state_dict(self) -> dict[str, Any]:
        return {"replica": list(self._replica), "sent": list(self._sent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the shared state. The replica must hold the weights of the checkpoint already."""
        self.steps = state["steps"]
        torch._foreach_copy_(self.weights, self._replica)
        if self.momentum:
            torch._foreach_copy_(self.momentum, [tensor.to(self._device) for tensor in state["momentum"]])
        arriving = state["arriving"]
        self._delta = None if arriving is None else arriving.to(self._device)
        self._work = None

    def load_own_state_dicts(self, states: Sequence[Mapping[str, Any]], resized: bool) -> None:
        """Load this worker's replica, or synchronize the saved replicas if the number of workers has changed."""
        if not resized:
            (state,) = states
            torch._foreach_copy_(self._replica, [tensor.to(self._device) for tensor in state["replica"]])
            self._sent = [
                torch.empty_like(own).copy_(sent) for own, sent in zip(self._replica, state["sent"], strict=False)
            ]
            return
        self._synchronize_saved(states)

    def _synchronize_saved(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Synchronize as the previous workers would have done at the time of the checkpoint.

        Each worker computes the same θ from all replicas in the checkpoint, and continues from it.
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
