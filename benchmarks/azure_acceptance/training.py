"""A run on both nodes: it trains for minutes, loses an evicted node, continues, and is stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.azure_acceptance.cloud import Cloud
from benchmarks.azure_acceptance.commands import Commands, Running
from benchmarks.azure_acceptance.estimate import Estimate
from benchmarks.azure_acceptance.report import Row, judged, not_checked

RUN = "acceptance"
START_SECONDS, EVICTION_SECONDS, RESUME_SECONDS, STOP_SECONDS = 1200.0, 2100.0, 900.0, 600.0
POLL_SECONDS = 2.0
COPY_SECONDS = 15.0  # remote changes are copied by then
MOST_LOST = 1  # steps, after a notice
NOTICE = "is to be taken away"  # the output of a run that received a notice


class Training:
    """The run. Its stages are methods; each returns rows and may raise."""

    def __init__(self, commands: Commands, cloud: Cloud, words: list[str]) -> None:
        self._commands, self._cloud, self._words = commands, cloud, words
        self._running: Running | None = None
        self._evicted = False

    @property
    def directory(self) -> Path:
        return self._commands.directory / "runs" / RUN

    def step(self) -> int:
        """Return the newest step that has been copied to this machine."""
        try:
            last = (self.directory / "metrics.jsonl").read_text().rpartition("}")[0].splitlines()[-1] + "}"
            return int(json.loads(last)["step"])
        except (OSError, IndexError, ValueError, KeyError):
            return 0

    def train(self, minutes: float, limit: float) -> Iterator[Row]:
        """Start it, and let it train."""
        began = time.monotonic()
        self._running = self._commands.start("train", *self._words, f"run.name={RUN}")
        self._wait(lambda: self.step() > 0, min(START_SECONDS, limit), "The run did not log a step")
        first, began_training = time.monotonic() - began, time.monotonic()
        before = self.step()
        self._wait(lambda: time.monotonic() - began_training > minutes * 60, limit, "The run did not continue to train")
        steps = self.step() - before
        yield judged(
            "training on two nodes",
            f"first step shown after {first:.0f} s, then {steps} steps in {minutes:.1f} min",
            "more steps",
            steps > 0,
        )

    def evict(self, limit: float) -> Iterator[Row]:
        """Let Azure evict one node of the run, and wait until the run continues."""
        self._needs_run()
        spot = sorted(vm["name"] for vm in self._cloud.workers() if vm["spot"])
        if not spot:
            yield not_checked("eviction of a node", "no node is a spot VM; cluster.spot=true rents them", "it goes")
            return
        before = self.step()
        self._cloud.evict(spot[0])
        began = time.monotonic()
        self._wait(
            lambda: spot[0] not in [vm["name"] for vm in self._cloud.workers()],
            min(EVICTION_SECONDS, limit),
            "The node is still there",
        )
        self._evicted = True
        seconds, until = time.monotonic() - began, time.monotonic() + COPY_SECONDS
        yield judged("eviction of a node", f"gone {seconds:.0f} s after the call", "it is deleted", True)
        self._wait(lambda: time.monotonic() > until, limit, "The run did not continue")
        there = self.step()
        self._wait(lambda: self.step() > there, min(RESUME_SECONDS, limit), f"No step after step {there}")
        yield judged(
            "the run continues after the eviction",
            f"step {before} at the call, {there} when the node had gone, then {self.step()} "
            f"after {time.monotonic() - began - seconds:.0f} s",
            "later steps",
            True,
        )

    def end(self, plan: Estimate, limit: float) -> Iterator[Row]:
        """Stop the run, and evaluate its record."""
        self._needs_run()
        assert self._running is not None
        stopped = self._commands.run("stop", RUN, seconds=min(STOP_SECONDS, limit))
        done = self._running.wait(min(STOP_SECONDS, limit))
        shown = self._commands.run("logs", RUN, "--no-follow", seconds=120, shows=False)
        yield judged(
            "`launch stop` ends the run",
            done.why if done.status or stopped.status else "exit status 0",
            "exit status 0",
            not done.status and not stopped.status,
        )
        yield judged(
            "`launch logs` shows the run",
            f"{len(shown.out.splitlines())} lines" if shown.status == 0 else shown.why,
            "exit status 0, lines",
            shown.status == 0 and shown.out != "",
        )
        result = json.loads((self.directory / "result.json").read_text())
        yield from rows(result, plan, self._evicted, NOTICE in done.err)

    def _needs_run(self) -> None:
        if self._running is None:
            raise RuntimeError("the run was not started")
        if self._running.status is not None:
            raise RuntimeError(f"the run has ended: {self._running.wait(0).why}")

    def _wait(self, done: Callable[[], bool], seconds: float, complaint: str) -> None:
        latest = time.monotonic() + seconds
        while not done():
            self._needs_run()
            if time.monotonic() > latest:
                raise RuntimeError(f"{complaint} within {seconds:.0f} s")
            time.sleep(POLL_SECONDS)


def rows(result: dict[str, Any], plan: Estimate, evicted: bool, noticed: bool) -> Iterator[Row]:
    """Evaluate result.json of the run. noticed: the run printed an eviction notice."""
    status, reason = result.get("status"), result.get("reason")
    yield judged("end of the run", f"{status} ({reason})", "stopped or completed", status in ("stopped", "completed"))
    asked = f"a notice, at least 1 regroup, at most {MOST_LOST} step lost, no restart"
    if evicted:
        lost, regroups, restarts = (int(result.get(key) or 0) for key in ("lost_steps", "preemptions", "restarts"))
        yield judged(
            "steps lost by the eviction",
            f"{regroups} regroups, {lost} steps lost, {restarts} restarts, workers {result.get('world_sizes')}; "
            f"the notice {'reached' if noticed else 'did not reach'} the run",
            asked,
            noticed and regroups >= 1 and lost <= MOST_LOST and restarts == 0,
        )
    else:
        yield not_checked("steps lost by the eviction", "no node was evicted", asked)
    yield _cost(result, plan)
    yield _pace(result, plan)


def _cost(result: dict[str, Any], plan: Estimate) -> Row:
    """Check the cost: one or two nodes and the head, over the whole time of the run."""
    hours = float(result.get("seconds") or 0.0) / 3600
    most = plan.usd_per_hour * hours
    least = (plan.usd_per_hour - plan.node_usd_per_hour) * hours
    asked = f"{least:.4f} to {most:.4f} USD: the plan's rates over {hours * 60:.1f} min"
    usd = result.get("cost_usd")
    if usd is None:
        return judged("recorded cost of the run", "no cost is recorded", asked, False)
    return judged("recorded cost of the run", f"{usd:.4f} USD", asked, least * 0.98 - 1e-4 <= usd <= most * 1.02 + 1e-4)


def _pace(result: dict[str, Any], plan: Estimate) -> Row:
    title, pace = "time of a step", result.get("samples_per_second")
    samples, steps = result.get("samples") or 0, result.get("steps") or 0
    if plan.seconds_per_step is None or not pace or not steps:
        return not_checked(title, "no time is predicted for this network, or none was measured", "the plan's")
    step = samples / steps / pace
    predicted = plan.seconds_per_step
    return judged(
        title, f"{step * 1e3:.2f} ms", f"the plan's {predicted * 1e3:.2f} ms is a lower bound", step >= 0.8 * predicted
    )
