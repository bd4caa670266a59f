"""Shows a run from its start to its end, on the command line and in notebooks."""

from __future__ import annotations

from typing import Any

from launcher.cli.streams import log_failure
from launcher.cli.terminal import Display
from launcher.formatting import count, detached, duration, evaluation
from launcher.jobs.prepare import Prepared
from launcher.jobs.training import Observer, Outcome, begun, over_text
from launcher.money import BUDGET, larger_budget
from launcher.planning.plan import Plan
from launcher.runs import RunDirectory


class RunDisplay(Observer):
    """Shows the events of a run on a display.

    Attributes:
        directory: the directory of the run, once it is known.
        finished: whether the run was completed before, so that there is nothing to do.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        display.stream.on_failure = lambda reason: self._log_failure()
        self.directory: RunDirectory | None = None
        self.finished = False

    def prepared(self, prepared: Prepared, plan: Plan | None) -> None:
        self.directory = prepared.directory
        self._begun(begun(prepared, plan))

    def sent(self, directory: RunDirectory, where: str) -> None:
        self.directory = directory
        self._display.say(f"{directory.name}: sent to {where}")

    def asked_to_end(self) -> str:
        return self._display.stop_or_detach()

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "begun":
            self._begun(event)
        else:
            self._display.show(event)

    def _log_failure(self) -> None:
        """Write to log.txt why the output is no longer shown, once the run has a directory."""
        reason = self._display.stream.failure
        if reason is not None and self.directory is not None and self.directory.exists():
            log_failure(self.directory.log, reason)

    def _begun(self, event: dict[str, Any]) -> None:
        assert self.directory is not None
        name = self.directory.name
        if event["finished"]:
            self.finished = True
            self._display.say(event["text"])
            return
        self._log_failure()
        self._display.workers = event["workers"]
        self._display.say(f"{name}: {event['headline']}")
        if event["changes"]:
            self._display.say(over_text(event["changes"]))


def conclusion(outcome: Outcome, interactive: bool) -> list[str]:
    """Return the last lines about a run: its status and metrics, and how to continue it or to see its curves.

    Args:
        interactive: standard error is a terminal.
    """
    name = outcome.directory.name
    if outcome.detached:
        return [detached(name)]
    result = outcome.result
    cost = f" for {usd:,.2f} USD" if (usd := result.get("cost_usd")) else ""
    facts = [f"{result['status']} after {count(result['steps'], 'step')} in {duration(result['seconds'] or 0)}{cost}"]
    lines = ["  ".join(facts + evaluation(result.get("metrics") or {}))]
    if result["status"] == "stopped":
        spent = result.get("reason") == BUDGET
        more = f" {larger_budget(result['cost_usd'])}" if spent else ""
        begin = "The budget is spent. Continue it" if spent else "Continue it"
        lines.append(how_to_continue(outcome.directory, begin) + more)
    elif interactive:
        lines.append("View it in TensorBoard with: launch board")
    return lines


def how_to_continue(directory: RunDirectory, begin: str = "Continue it") -> str:
    """Return the command that continues a run."""
    root = "" if directory.path.parent.name == "runs" else f" run.root={directory.root}"
    return f"{begin} with: launch run.name={directory.name}{root} run.resume=true"


def after_failure(directory: RunDirectory, error: BaseException) -> list[str]:
    """Return how to continue a run that failed after it had started, unless the message of the error contains it."""
    checkpoint = directory.result().get("checkpoint")
    if checkpoint is None:
        return [f"The run has no checkpoint yet. {how_to_continue(directory, 'Start it again')}"]
    if "run.resume" in str(error):
        return []
    return [f"The last good checkpoint is {checkpoint}. {how_to_continue(directory)}"]
