"""What a strategy is: it owns the wrapping of the model, the gradients of a step, and their application.

The loop hands over this rank's microbatches and learns what all ranks agreed on; it never asks which strategy it has.
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
from launcher.engine.runtime import Runtime, Vote
from launcher.engine.strategies.kinds.base import DEFAULT
from launcher.engine.strategies.sparse import dense_parts
from launcher.errors import ConfigError, TrainingError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Record = Callable[[Mapping[str, Any]], None]
_BROADCAST_BYTES = 250 * 2**20  # in one message, as DDP does it


class Steps(nn.Module):
    """Calls the model's steps through one `forward`, so that the hooks of whatever wraps it see them.

    `used`: the parameters that had a gradient in every batch so far. `needed`: those to which a share without samples
    gives a gradient of zeros, so that others do not wait for it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.used: list[nn.Parameter] = []
        self.needed: list[nn.Parameter] = []

    def forward(self, batch: Any, method: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        if method is not None:
            return method(self.model, batch)
        if batch is None:  # a share without samples: no loss, but the hook of every gradient that others have fires
            return {"loss": (sum(as_real(p).sum() * 0.0 for p in self.needed), 0.0)}
        return self.model.training_step(batch)  # type: ignore[operator]


class Strategy(ABC):
    """Gradients of one global batch, whatever the number of workers.

    Attributes:
        model: the user's network, on the device, unwrapped; what is checkpointed and evaluated.
        buffers: those of `model`, which every rank changes by itself.
        optimized: the parameters of the optimizer.
        uses_all: whether the first batch gave every trained parameter a gradient; known after `prepare`.
        sparse: the parameters whose gradients are sparse; known after `prepare`.
    """

    # Whether the set of trained parameters may change between two steps, and whether all ranks have the same gradients.
    follows = False
    reduces_while_computing = False  # gradients are those of the global batch as soon as `accumulate` is done
    PROBED = 65_536  # numbers of the gradients, at most, that are looked at in every step
    shares_gradients = True

    def __init__(self, model: nn.Module, runtime: Runtime, trainer: TrainerConfig) -> None:
        self.model = model
        self.optimized: list[nn.Parameter] = []
        self._probed: list[nn.Parameter] = []
        self._found, self._one = torch.zeros(1, device=runtime.device), torch.ones(1, device=runtime.device)
        self.runtime = runtime
        self.clip_norm = trainer.clip_norm
        self._precision = DTYPES[trainer.precision]
        self._scaler = torch.amp.GradScaler(runtime.device.type, enabled=trainer.precision == "float16")
        self._steps = Steps(model)
        self.buffers = Buffers(model, runtime)
        self._parameters = list(model.parameters())  # walking the modules every step takes as long as the vote
        self.uses_all = True
        self.sparse: list[nn.Parameter] = []
        if trainer.compile:
            # Kernels for shapes in general are made once the second shape is met, which is another chunk on every rank.
            dynamic = False if trainer.deterministic else None
            for part in repeated_blocks(model) if trainer.compile_blocks else [self._steps]:
                part.compile(dynamic=dynamic)

    def cast(self) -> AbstractContextManager[Any]:
        """The context in which the network computes in `trainer.precision`."""
        return casting(self.runtime.device, self._precision)

    def call(self, method: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """Return `method(model, batch)`, with every weight in its place."""
        return method(self.model, batch)

    def merge_buffers(self) -> None:
        """Make the buffers of all ranks one, for good. Every rank calls it at the same steps of every run."""
        self.buffers.merge()

    @contextmanager
    def evaluation_weights(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, the model holds the weights and buffers that are evaluated, saved and exported. Every rank enters it.

        Yields the buffers of this rank that are others outside, by name.
        """
        with self.buffers.shown(self.buffers.merged()) as own:
            yield own

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, any rank may call the model's own methods, by itself and without gradients. Every rank enters it."""
        yield

    def idle_rounds(self, split: Split, length: int) -> int:
        """Return how many microbatches of `length` samples this rank takes part in without having one itself."""
        return 0

    def drawable(self) -> nn.Module | None:
        """Return the network where rank 0 alone may call it, else None."""
        return self.model

    def attach(self, optimizer: Optimizer, total_steps: int) -> None:
        """Learn of the optimizer and of the run's length, once both are known."""
        self.attach_parameters(optimizer)

    def attach_parameters(self, optimizer: Optimizer) -> None:
        """Learn which parameters the optimizer has: their gradients are measured and clipped, and no others'."""
        self.optimized = [p for group in optimizer.param_groups for p in group["params"]]
        self._probed, numbers = [], 0
        for parameter in sorted((p for p in self.optimized if p.numel()), key=lambda p: p.numel()):
            numbers += parameter.numel()
            if self._probed and numbers > self.PROBED:
                break
            self._probed.append(parameter)

    def rewrap(self, batch: Any) -> None:
        """Wrap the model again, since other parameters are trained; see `prepare`.

        Raises:
            TrainingError: this strategy cannot (`follows` is false).
        """
        raise TrainingError(self.refusal_to_follow())

    def refusal_to_follow(self) -> str:
        """Return why the strategy cannot train other parameters from a step on, and what to do."""
        return (
            "This strategy cannot follow a change of the trained parameters: it keeps state for each of them. Use "
            f"strategy={DEFAULT} without strategy.compression=powersgd, or choose what is trained before the run, in "
            "the model's constructor or with optimizer.groups."
        )

    def replicated(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Return what must be the same on all ranks, as (parameter, tensor that belongs to it)."""
        return [(p, p.detach()) for p in self.optimized if p.requires_grad]

    @abstractmethod
    def prepare(self, batch: Any) -> dict[str, Any]:
        """Wrap the model. `batch` is a microbatch, the same on every rank, to run the hooks once before step 0.

        Weights, buffers and random states are as before afterwards, except that all ranks hold rank 0's. Returns the
        model's answer.
        """

    @abstractmethod
    def accumulate(self, batches: Iterable[Any], size: int, flags: dict[str, bool], record: Record) -> Vote:
        """Run forward and backward over this rank's microbatches and combine the gradients of all ranks.

        Args:
            batches: this rank's microbatches on the device; none when the global batch has no part for it.
            size: samples in the global batch.
            flags: what this rank wants all ranks to know, see `Runtime.vote`; `bad` is raised here.
            record: is given each microbatch's answer.
        """

    @abstractmethod
    def apply(self, optimizer: Optimizer, size: int, vote: Vote) -> None:
        """Divide the gradients once by the global count, clip, and step the optimizer."""

    def grad_norm(self) -> torch.Tensor:
        """Return the norm of the gradient that was last applied, before clipping."""
        if self.clip_norm is not None:
            return self._norm
        grads = [p.grad for p in self.optimized if p.grad is not None]
        return torch.nn.utils.get_total_norm(dense_parts(grads))

    def gradients_are_finite(self) -> torch.Tensor | bool | None:
        """Return whether the small gradients are finite, on a GPU as a tensor there; None where that says nothing.

        For use between `accumulate` and `apply`. With float16 the loss scaler expects overflows, and passes over them.
        """
        if self._scaler.is_enabled():
            return None
        grads = [_values(p.grad) for p in self._probed if p.grad is not None]
        if not grads:
            return None
        self._found.zero_()
        for dtype in {grad.dtype for grad in grads}:
            # What the loss scaler calls: the quickest look by far. The factor of 1 changes nothing.
            alike = [grad for grad in grads if grad.dtype is dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(alike, self._found, self._one)
        return not self._found.item() if self.runtime.device.type == "cpu" else self._found[0] == 0

    def bad_gradient(self) -> str | None:
        """Return the name of a parameter whose gradient on this rank is not finite."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(_values(parameter.grad)).all()):
                return name
        return None

    def is_finite(self) -> bool:
        """Whether every weight is a finite number; the same on every rank."""
        return all_finite(p.detach() for p in self.model.parameters())

    # ---- what strategies are made of --------------------------------------------------------------------------------

    _norm: torch.Tensor

    def _clip_and_step(self, optimizer: Optimizer, grads: list[torch.Tensor]) -> None:
        if self.clip_norm is not None:
            parts = dense_parts(grads)
            self._norm = torch.nn.utils.get_total_norm(parts)
            if self.sparse:  # as torch clips dense gradients
                torch._foreach_mul_(parts, (self.clip_norm / (self._norm + 1e-6)).clamp(max=1.0))
            else:
                owners = [p for p in self.optimized if p.grad is not None]
                torch.nn.utils.clip_grads_with_norm_(owners, self.clip_norm, self._norm)
        self._scaler.step(optimizer)
        self._scaler.update()

    def _agree_on_overflow(self, optimizer: Optimizer) -> bool:
        """Make all ranks skip the step where one of them found a gradient that is not finite; tell whether one did.

        For strategies whose ranks hold different gradients when the loss scaler looks at them. Like
        `torch.distributed.fsdp.sharded_grad_scaler`, it goes through the scaler's own record.
        """
        if not self._scaler.is_enabled():
            return False
        found = self._scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        together = [self.runtime.add_up(value).clamp_(max=1.0) for value in found]  # fused kernels ask whether it is 1
        return any(bool(value.item()) for value in together)

    def _broadcast(self) -> None:
        """Give all ranks the parameters and buffers of rank 0."""
        tensors = [as_real(tensor.detach()) for tensor in (*self.model.parameters(), *self.model.buffers())]
        if tensors and not self.runtime.alone:
            torch.distributed._broadcast_coalesced(self.runtime.group, tensors, _BROADCAST_BYTES, 0)

    def _warm_up(self, network: nn.Module, batch: Any) -> dict[str, Any]:
        """Run forward and backward over a batch; return the model's answer. For use inside `preserve_model`."""
        with self.cast():
            answer = network(batch)
        loss_of(answer)[0].backward()
        return answer

    def _clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def _is_bad(self, loss: torch.Tensor) -> bool:
        """Whether the loss is known not to be finite.

        On a GPU reading it would stop the device each step; there the sums are looked at when logged.
        """
        return self.runtime.device.type == "cpu" and not math.isfinite(loss.item())

    def _on_every_rank(self, fine: bool) -> bool:
        """Whether it is so on every rank; each of them asks."""
        bad = torch.tensor([0.0 if fine else 1.0], device=self.runtime.device)
        return not bool(self.runtime.add_up(bad).item())

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks share."""
        return {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scaler.load_state_dict(dict(state["scaler"]))

    def own_state_dict(self) -> dict[str, Any]:
        """Return what this rank has of its own."""
        return {}

    def load_own_state_dicts(  # noqa: B027 (most have nothing of their own)
        self, states: Sequence[Mapping[str, Any]], resized: bool
    ) -> None:
        """Go on from what the ranks had of their own, after `load_state_dict`.

        Args:
            states: this rank's own state, or, where the number of ranks has changed (`resized`), that of every rank
                that there was.
        """


def casting(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context in which a network computes in that precision."""
    if precision is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    present = [_values(tensor) for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    present = [tensor for tensor in present if tensor.numel()]
    return not present or bool(_finite(present))


def _finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return whether the real tensors, none of them empty, are finite. The largest number says so of each."""
    return torch.stack([largest.double() for largest in torch._foreach_norm(tensors, math.inf)]).isfinite().all()


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor that may be sparse, divided among the workers or complex, as real ones."""
    own: Any = tensor
    own = own.to_local() if hasattr(own, "device_mesh") else own
    own = own._values() if own.is_sparse else own
    return as_real(own)


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complex tensor (…) as pairs of real numbers (…, 2) in the same memory, and any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that the network repeats: the modules of every nn.ModuleList of two or more of one class.

    Compiled by themselves they share one graph, so that compiling takes no longer for twelve blocks than for one
    (regional compilation, docs.pytorch.org/tutorials/recipes/regional_compilation.html). Lists within a block do not
    count.

    Raises:
        ConfigError: there is none.
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
            f"trainer.compile_blocks=true was asked for, and {type(model).__name__} has no nn.ModuleList of blocks of "
            "one class. Leave it out; trainer.compile=true then compiles the whole network."
        )
    return blocks


def loss_of(answer: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return the differentiable sum of the loss and its count.

    Raises:
        ContractError: it is not one number, or nothing that is trained has part in it.
    """
    total, count = as_pair("loss", check_answer(answer)["loss"])
    if total.ndim or not total.requires_grad:
        found = f"a sum of shape {tuple(total.shape)}" if total.ndim else "one without a gradient"
        raise ContractError(
            'training_step must return under "loss" what depends on the trained parameters, as one value per sample or '
            f"as a pair (sum, count) of two numbers; found {found}."
        )
    return total, count


def scale_by_count(grads: list[torch.Tensor], size: int, count: torch.Tensor) -> None:
    """Make means over `size` samples into means over `count` samples, tokens or weights, in place."""
    # Gradients that were moved to the host have waited for the device already, and cannot be multiplied there.
    if count.device.type == "cpu" or all(grad.device.type == "cpu" for grad in grads):
        number = count.item()
        if number != size:
            torch._foreach_mul_(grads, size / max(number, 1e-30))
    else:
        multiply(grads, size / count.clamp(min=1e-30))


def multiply(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients by a number on their device, in place; those of float64 by all of its digits."""
    for wide in (False, True):
        some = [grad for grad in grads if (grad.dtype in (torch.float64, torch.complex128)) is wide]
        if some:
            torch._foreach_mul_(some, factor.double() if wide else factor.float())


def mark_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield (batch, is it the last); a single (None, True) when there is none."""
    iterator = iter(batches)
    current = next(iterator, None)
    while True:
        following = next(iterator, None) if current is not None else None
        yield current, following is None
        if following is None:
            return
        current = following
