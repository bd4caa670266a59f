"""The base class of strategies. A strategy wraps the model, computes the gradients of a step, and applies them.

The training loop passes the microbatches of this rank and receives the vote of all ranks. It does not depend on which
strategy it uses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.config import TrainerConfig
from launcher.engine.buffers import Buffers
from launcher.engine.metrics import ContractError, as_pair, check_answer
from launcher.engine.order import Split
from launcher.engine.progress import Progress
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.steps import StepInfo, Steps
from launcher.engine.strategies.kinds.base import DEFAULT
from launcher.engine.strategies.sparse import dense_parts
from launcher.engine.tensors import as_real
from launcher.errors import ConfigError, TrainingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Record = Callable[[Mapping[str, Any]], None]
_BROADCAST_BYTES = 250 * 2**20  # per message, as in DDP


class Strategy(ABC):
    """Computes and applies the gradients of one global batch, for any number of workers.

    Attributes:
        model: the user's network, on the device, unwrapped. It is checkpointed and evaluated.
        buffers: the buffers of `model`, which each rank updates independently.
        optimized: the parameters of the optimizer.
        uses_all: whether every trained parameter had a gradient in the first batch; set by `prepare`.
        sparse: the parameters with sparse gradients; set by `prepare`.
    """

    follows = False  # the set of trained parameters may change between two steps
    shares_gradients = True  # all ranks have the same gradients in `apply`
    reduces_while_computing = False  # `accumulate` returns with the gradients of the global batch
    PROBED = 65_536  # maximum number of gradient values that are checked in every step

    def __init__(self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig) -> None:
        self.model = model
        self.optimized: list[nn.Parameter] = []
        self._probed: list[nn.Parameter] = []
        self._probes_plain_tensors = True
        self._found, self._one = torch.zeros(1, device=runtime.device), torch.ones(1, device=runtime.device)
        self.runtime = runtime
        self.clip_norm = trainer.clip_norm
        self._precision = DTYPES[trainer.precision]
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=trainer.precision == "float16")
        self._steps = Steps(model)
        self.buffers = Buffers(model, runtime)
        self._parameters = list(model.parameters())  # traversing the modules in every step would take as long as a vote
        self.uses_all = True
        self.sparse: list[nn.Parameter] = []
        if trainer.compile:
            # With dynamic=None, kernels for dynamic shapes are compiled at the second shape, which occurs at a
            # different chunk on each rank.
            dynamic = False if trainer.deterministic else None
            for part in repeated_blocks(model) if trainer.compile_blocks else [self._steps]:
                part.compile(dynamic=dynamic)

    @property
    def info(self) -> StepInfo:
        """The current step, for models whose `training_step` has a second parameter."""
        return self._steps.info

    def begin(self, progress: Progress, total_steps: int) -> None:
        """Note which step follows. Called before each step."""
        if self._steps.takes_step:
            self._steps.info = StepInfo.following(progress, total_steps, self.runtime)

    def stand_at(self, progress: Progress, total_steps: int) -> None:
        """Note the last step of a checkpoint, for an evaluation without training."""
        self._steps.info = StepInfo.last(progress, total_steps, self.runtime)

    def cast(self) -> AbstractContextManager[Any]:
        """Return the context in which the network computes in `trainer.precision`."""
        return casting(self.runtime.device, self._precision)

    def call(self, method: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """Return `method(model, batch)`, with all weights gathered."""
        return method(self.model, batch)

    def merge_buffers(self) -> None:
        """Merge the buffers of all ranks, permanently. A collective that every run calls at the same steps."""
        self.buffers.merge()

    @contextmanager
    def evaluation_weights(self) -> Iterator[dict[str, torch.Tensor]]:
        """Within this context, the model holds the weights and buffers to evaluate, save and export. A collective.

        Yields:
            The buffers of this rank, by name, that have other values outside of the context.
        """
        with self.buffers.shown(self.buffers.merged()) as own:
            yield own

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within this context, any rank may call methods of the model alone, without gradients. A collective."""
        yield

    def idle_rounds(self, split: Split, length: int) -> int:
        """Return the number of passes over `length` samples in which this rank participates without a microbatch."""
        return 0

    def drawable(self) -> nn.Module | None:
        """Return the network if rank 0 may call it without the other ranks, else None."""
        return self.model

    def attach(self, optimizer: Optimizer, total_steps: int) -> None:
        """Set the optimizer and the length of the run. Called once, before the first step."""
        self.attach_parameters(optimizer)

    def attach_parameters(self, optimizer: Optimizer) -> None:
        """Set the parameters of the optimizer, whose gradients are measured and clipped."""
        self.optimized = [p for group in optimizer.param_groups for p in group["params"]]
        self._probed, numbers = [], 0
        for parameter in sorted((p for p in self.optimized if p.numel()), key=lambda p: p.numel()):
            numbers += parameter.numel()
            if self._probed and numbers > self.PROBED:
                break
            self._probed.append(parameter)
        # Asking each gradient in each step would take as long as looking at its numbers.
        self._probes_plain_tensors = not any(p.is_complex() or hasattr(p, "device_mesh") for p in self._probed)

    def rewrap(self, batch: Any) -> None:
        """Wrap the model again after the set of trained parameters has changed; see `prepare`.

        Raises:
            TrainingError: the strategy does not support it (`follows` is False).
        """
        raise TrainingError(self.refusal_to_follow())

    def refusal_to_follow(self) -> str:
        """Return the message for a change of the trained parameters that the strategy does not support."""
        return (
            "This strategy cannot follow a change of the trained parameters during a run, because it keeps state for "
            f"each of them. Use strategy={DEFAULT} without strategy.compression=powersgd, or choose the trained "
            "parameters before the run, in the model's constructor or with optimizer.groups."
        )

    def replicated(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Return the tensors that must be equal on all ranks, as (parameter, its tensor)."""
        return [(p, p.detach()) for p in self.optimized if p.requires_grad]

    @abstractmethod
    def prepare(self, batch: Any) -> dict[str, Any]:
        """Wrap the model, and run forward and backward once before step 0. Return the result of the model.

        Weights, buffers and random states are restored afterwards, and all ranks have those of rank 0.

        Args:
            batch: a microbatch, equal on all ranks.
        """

    @abstractmethod
    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        """Run forward and backward on this rank's microbatches and combine the gradients of all ranks.

        Args:
            batches: this rank's microbatches on the device; empty if the global batch has no samples for this rank.
            size: number of samples in the global batch.
            flags: this rank's flags for `Runtime.vote`; `bad` is set here if the loss is not finite.
            record: called with the model's result for each microbatch.
        """

    @abstractmethod
    def apply(self, optimizer: Optimizer, size: int, vote: Vote) -> None:
        """Divide the gradients by the global count, clip them, and step the optimizer."""

    def grad_norm(self) -> torch.Tensor:
        """Return the norm of the last applied gradient, before clipping."""
        if self.clip_norm is not None:
            return self._norm
        grads = [p.grad for p in self.optimized if p.grad is not None]
        return torch.nn.utils.get_total_norm(dense_parts(grads))

    def gradients_are_finite(self) -> torch.Tensor | bool | None:
        """Return whether the gradients of small parameters are finite (on a GPU as a tensor), or None if not checked.

        Call it between `accumulate` and `apply`. With float16 nothing is checked: the loss scaler handles overflows.
        """
        if self._scaler.is_enabled():
            return None
        grads = [p.grad for p in self._probed if p.grad is not None]
        if self.sparse or not self._probes_plain_tensors:
            grads = [_values(grad) for grad in grads]
        if not grads:
            return None
        self._found.zero_()
        for dtype in {grad.dtype for grad in grads}:
            # The loss scaler uses this function, which is by far the fastest check. The factor 1 changes nothing.
            alike = [grad for grad in grads if grad.dtype is dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(alike, self._found, self._one)
        return not self._found.item() if self.runtime.device.type == "cpu" else self._found[0] == 0

    def bad_gradient(self) -> str | None:
        """Return the name of a parameter with a gradient on this rank that is not finite, or None."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(_values(parameter.grad)).all()):
                return name
        return None

    def is_finite(self) -> bool:
        """Return whether every weight is finite; equal on all ranks."""
        return all_finite(p.detach() for p in self.model.parameters())

    # ---- helpers for subclasses -------------------------------------------------------------------------------------

    _norm: torch.Tensor

    def _clip_and_step(self, optimizer: Optimizer, grads: list[torch.Tensor]) -> None:
        if self.clip_norm is not None:
            parts = dense_parts(grads)
            self._norm = torch.nn.utils.get_total_norm(parts)
            if self.sparse:  # the same formula as clip_grads_with_norm_, which supports only dense gradients
                torch._foreach_mul_(parts, (self.clip_norm / (self._norm + 1e-6)).clamp(max=1.0))
            else:
                owners = [p for p in self.optimized if p.grad is not None]
                torch.nn.utils.clip_grads_with_norm_(owners, self.clip_norm, self._norm)
        self._scaler.step(optimizer)
        self._scaler.update()

    def _agree_on_overflow(self, optimizer: Optimizer) -> bool:
        """Make all ranks skip the step if one has a gradient that is not finite; return whether one has.

        For strategies whose ranks hold different gradients when the loss scaler checks them. Like
        `torch.distributed.fsdp.sharded_grad_scaler`, it changes the private record of the scaler.
        """
        if not self._scaler.is_enabled():
            return False
        found = self._scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        totals = [self.runtime.add_up(value).clamp_(max=1.0) for value in found]  # fused kernels compare it with 1
        return any(bool(value.item()) for value in totals)

    def _broadcast(self) -> None:
        """Broadcast the parameters and buffers of rank 0."""
        tensors = [as_real(tensor.detach()) for tensor in (*self.model.parameters(), *self.model.buffers())]
        if tensors and not self.runtime.alone:
            torch.distributed._broadcast_coalesced(self.runtime.group, tensors, _BROADCAST_BYTES, 0)

    def _warm_up(self, network: nn.Module, batch: Any) -> dict[str, Any]:
        """Run forward and backward on a batch and return the result of the model. Call it within `preserve_model`."""
        with self.cast():
            answer = network(batch)
        loss_of(answer)[0].backward()
        return answer

    def _clear(self) -> None:
        """Clear the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def _is_bad(self, loss: torch.Tensor) -> bool:
        """Return whether the loss is known not to be finite.

        On a GPU the loss is not read, because that would synchronize the device in each step; the sums are checked when
        they are logged.
        """
        return self.runtime.device.type == "cpu" and not math.isfinite(loss.item())

    def _on_every_rank(self, fine: bool) -> bool:
        """Return whether `fine` is true on every rank. A collective."""
        bad = torch.tensor([0.0 if fine else 1.0], device=self.runtime.device)
        return not bool(self.runtime.add_up(bad).item())

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state that all ranks share."""
        return {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scaler.load_state_dict(dict(state["scaler"]))

    def own_state_dict(self) -> dict[str, Any]:
        """Return the state of this rank alone."""
        return {}

    def load_own_state_dicts(  # noqa: B027 (most strategies have no state of this kind)
        self, states: Sequence[Mapping[str, Any]], resized: bool
    ) -> None:
        """Load the results of `own_state_dict`, after `load_state_dict`.

        Args:
            states: the state of this rank; if the number of ranks has changed, the states of all previous ranks.
            resized: whether the number of ranks has changed.
        """


def casting(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context in which a network computes in `precision`."""
    if precision is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    present = [_values(tensor) for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    present = [tensor for tensor in present if tensor.numel()]
    return not present or bool(_finite(present))


def _finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return whether non-empty real tensors are finite, by the maximum norm of each."""
    return torch.stack([largest.double() for largest in torch._foreach_norm(tensors, math.inf)]).isfinite().all()


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local values of a tensor (sparse, DTensor or complex) as a dense real tensor."""
    own: Any = tensor
    own = own.to_local() if hasattr(own, "device_mesh") else own
    own = own._values() if own.is_sparse else own
    return as_real(own)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network: the modules of every nn.ModuleList with at least two of one class.

    If they are compiled separately, they share one graph, so compilation takes the same time for twelve blocks as for
    one (regional compilation, docs.pytorch.org/tutorials/recipes/regional_compilation.html). Lists within a block are
    ignored.

    Raises:
        ConfigError: the network has no repeated blocks.
    """
    blocks: list[nn.Module] = []
    within: set[int] = set()
    for module in model.modules():
        if id(module) in within or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(block) for block in module}) == 1:
            blocks += module
            within.update(id(inner) for block in module for inner in block.modules())
    if not blocks:
        raise ConfigError(
            f"trainer.compile_blocks=true needs an nn.ModuleList of blocks of one class, which {type(model).__name__} "
            "does not have. Remove it; trainer.compile=true then compiles the whole network.",
            key="trainer.compile_blocks",
        )
    return blocks


def loss_of(answer: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return the differentiable sum of the loss and its count, from the result of `training_step`.

    Raises:
        ContractError: the loss is not a single number, or does not depend on a trained parameter.
    """
    total, count = as_pair("loss", check_answer(answer)["loss"])
    if total.ndim or not total.requires_grad:
        found = f"a sum of shape {tuple(total.shape)}" if total.ndim else "one without a gradient"
        raise ContractError(
            'training_step must return a "loss" that depends on the trained parameters, as one value per sample or as '
            f"a pair (sum, count) of two numbers; found {found}."
        )
    return total, count


def scale_by_count(grads: list[torch.Tensor], size: int, count: torch.Tensor | float) -> None:
    """Convert means over `size` samples to means over `count` samples, tokens or weights, in place."""
    # Gradients in host memory cannot be multiplied by a tensor on the device; the device was synchronized already.
    if not isinstance(count, torch.Tensor) or all(grad.device.type == "cpu" for grad in grads):
        number = float(count)
        if number != size:
            torch._foreach_mul_(grads, size / max(number, 1e-30))
    else:
        multiply(grads, size / count.clamp(min=1e-30))


def multiply(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients in place by a number on their device, in float64 for float64 gradients, else in float32."""
    for wide in (False, True):
        some = [grad for grad in grads if (grad.dtype in (torch.float64, torch.complex128)) is wide]
        if some:
            torch._foreach_mul_(some, factor.double() if wide else factor.float())


def mark_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield (batch, whether it is the last one); yield a single (None, True) if there are no batches."""
    iterator = iter(batches)
    current = next(iterator, None)
    while True:
        following = next(iterator, None) if current is not None else None
        yield current, following is None
        if following is None:
            return
        current = following
