"""Tracks the trained parameters, which a callback may change between two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from launcher.engine.drift import Copy, abbreviated
from launcher.engine.optim import destinations
from launcher.engine.runtime import Runtime
from launcher.engine.strategies.strategy import Strategy
from launcher.errors import TrainingError


class TrainedParameters:
    """The trained parameters of a run: those that require a gradient when a step begins.

    A parameter that becomes trained is added to the optimizer, in the group of its rule in `optimizer.groups`. A
    parameter that becomes frozen has no gradient, so every optimizer skips it; its optimizer state is kept in case it
    is trained again.

    Args:
        rules: `optimizer.groups`.

    Attributes:
        configured: names of the parameters that are trained at the start of the run.
        stale: whether the strategy must wrap the model again before the next step.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, strategy: Strategy, rules: Sequence[Mapping[str, Any]]
    ) -> None:
        self._named = list(model.named_parameters())
        self._optimizer, self._strategy = optimizer, strategy
        kinds = destinations(model, rules)
        order = sorted(set(kinds))
        self._groups = [order.index(kind) for kind in kinds]
        self._flags = self.flags()
        self.configured = self.names()
        self.name_of = {id(parameter): name for name, parameter in self._named}
        self.stale = False

    def flags(self) -> list[bool]:
        """Return `requires_grad` of every parameter."""
        return [parameter.requires_grad for _, parameter in self._named]

    def names(self) -> list[str]:
        """Return the names of the trained parameters."""
        return [name for name, parameter in self._named if parameter.requires_grad]

    def graded(self) -> list[str]:
        """Return the names of the parameters with a gradient."""
        return [name for name, parameter in self._named if parameter.grad is not None]

    def unexpected(self) -> list[str]:
        """Return the names of the parameters whose `requires_grad` changed outside of callbacks."""
        return [self._named[index][0] for index in _differing(self._flags, self.flags())]

    def follow(self, before: Sequence[bool], who: str, step: int) -> str | None:
        """Apply a change of the trained parameters since `before`; return a line for the user, or None.

        Args:
            who: description of the callback that made the change.

        Raises:
            TrainingError: the strategy does not support the change.
        """
        now = self.flags()
        changed = _differing(before, now)
        if not changed:
            return None
        names = [self._named[index][0] for index in changed]
        listed = abbreviated(names)
        if not self._strategy.follows:
            raise TrainingError(
                f"{who} changed which parameters are trained at step {step} ({listed}). "
                f"{self._strategy.refusal_to_follow()}"
            )
        for index in changed:
            self._flags[index] = now[index]
        self._apply(changed)
        more = sum(now[index] for index in changed)
        counts = {"more": more, "fewer": len(names) - more}
        changes = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return f"Trained parameters from step {step + 1} on: {changes} ({listed}), by {who}."

    def rewrap(self, runtime: Runtime, flags: Mapping[str, bool], batch: Callable[[], Any], step: int) -> None:
        """Wrap the model again after the trained parameters have changed.

        Args:
            flags: the flags of the vote of the next step.
            batch: returns a microbatch that is the same on every rank.

        Raises:
            TrainingError: the ranks do not train the same parameters.
        """
        # This vote has the form of a step's vote, so that it matches the vote of ranks without a change: none hangs.
        vote = runtime.vote(0.0, {name: name == "trained" for name in flags}).wait()
        changed_by_all = vote.votes["trained"] == runtime.world_size
        if not changed_by_all or len(set(map(tuple, runtime.gather(self.flags())))) > 1:
            raise TrainingError(
                f"A callback changed which parameters are trained at step {step}, but differently between ranks. "
                "Change requires_grad in the same way on every rank; callbacks run on all ranks."
            )
        self._strategy.rewrap(batch())
        self.stale = False

    def copy(self) -> Copy:
        """Return the state of this rank's copy of the model, for the comparison with the other ranks."""
        strategy = self._strategy
        weights = [(self.name_of[id(p)], tensor) for p, tensor in strategy.replicated()]
        return Copy(weights, self.names(), self.graded() if strategy.shares_gradients else None, self.unexpected())

    def _apply(self, changed: Sequence[int]) -> None:
        """Add newly trained parameters to the optimizer, and clear the gradients of changed parameters."""
        inside = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for index in changed:
            parameter = self._named[index][1]
            parameter.grad = None
            if parameter.requires_grad and id(parameter) not in inside:
                self._optimizer.param_groups[self._groups[index]]["params"].append(parameter)
        for group in self._optimizer.param_groups:
            if group.get("fused") and "momentum" in group:
                group["fused"] = False  # fused SGD needs momentum for all of its parameters, or for none
        self._strategy.attach_parameters(self._optimizer)
        self.stale = True

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state for a checkpoint, or None if the trained parameters are the configured ones."""
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        joined = [name for name, p in self._named if id(p) in known and name not in set(self.configured)]
        if not joined and self.names() == self.configured:
            return None
        return {"configured": self.configured, "now": self.names(), "joined": joined}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore the trained parameters; call it before the optimizer is restored.

        If the configuration now trains other parameters, they remain, and the check of the optimizer reports it.
        """
        if state is None or list(state["configured"]) != self.configured:
            return
        now, joined = set(state["now"]), set(state["joined"])
        for name, parameter in self._named:
            parameter.requires_grad_(name in now or name in joined)
        self._apply(_differing(self._flags, self.flags()))
        for name, parameter in self._named:
            parameter.requires_grad_(name in now)
        self._flags = self.flags()


def _differing(before: Sequence[bool], now: Sequence[bool]) -> list[int]:
    return [index for index, (was, flag) in enumerate(zip(before, now, strict=True)) if was != flag]
