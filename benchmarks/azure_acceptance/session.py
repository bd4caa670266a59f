"""The stages of an acceptance run: the cluster is created, each stage is checked, and the cluster is always removed."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.azure_acceptance import nodes
from benchmarks.azure_acceptance.cloud import Cloud
from benchmarks.azure_acceptance.commands import Commands, parsed
from benchmarks.azure_acceptance.estimate import Estimate
from benchmarks.azure_acceptance.report import FAILED, NOT_CHECKED, PASSED, Report, Row, judged, not_checked
from benchmarks.azure_acceptance.training import POLL_SECONDS, Training

UP_SECONDS, DOWN_SECONDS, DOWN_ATTEMPTS = 2700.0, 1800.0, 3
IDLE_SECONDS = 1500.0  # beyond cluster.idle_minutes, for the deletion of a node, and for a pending node to start
BUDGET_SHARE = 0.85  # of the budget; the rest pays for the removal
BLOB_ATTEMPTS, BLOB_PAUSE = 4, 90.0  # a role assignment takes minutes to become effective


@dataclass(frozen=True)
class Asked:
    """The request of the owner of the account.

    Attributes:
        cluster, plan, train: words of `launch up`, `launch plan` and `launch train`.
        minutes: how long the run trains before the eviction.
    """

    name: str
    cluster: list[str]
    plan: list[str]
    train: list[str]
    minutes: float
    idle_minutes: float
    blob: str | None = None


class Session:
    """One acceptance run. `run` raises only KeyboardInterrupt, after the cluster is removed."""

    def __init__(self, asked: Asked, plan: Estimate, commands: Commands, cloud: Cloud, report: Report) -> None:
        self._asked, self._plan, self._commands, self._cloud, self._report = asked, plan, commands, cloud, report
        self._began = time.monotonic()
        self._training = Training(commands, cloud, asked.train)
        self._is_up = False

    def run(self) -> None:
        stages: list[tuple[str, Callable[[], Iterable[Row]]]] = [
            ("GPU nodes", self._nodes),
            ("Blob run root", self._blob),
            ("training on two nodes", lambda: self._training.train(self._asked.minutes, self._left())),
            ("eviction of a node", lambda: self._training.evict(self._left())),
            ("results of the run", lambda: self._training.end(self._plan, self._left())),
            ("autoscaling to zero", self._idle),
        ]
        try:
            with _terminated_like_interrupted():
                self._stage("`launch up`", self._up)
                for title, stage in stages:
                    if not self._is_up:
                        self._add(not_checked(title, "the cluster did not come up"))
                    elif self._left() <= 0:
                        self._add(not_checked(title, f"{BUDGET_SHARE:.0%} of the budget is spent"))
                    else:
                        self._stage(title, stage)
        except KeyboardInterrupt:
            self._add(Row("uninterrupted", "interrupted", "the run comes to its end", FAILED))
            raise
        finally:
            with _undisturbed():
                self._stage("end of the commands", self._close)
                self._stage("`launch down`", self._down)
                self._stage("the resource group is gone", self._gone)
                self._stage("cost and time of all", self._bill)

    def _left(self) -> float:
        """Return the number of seconds for which the budget lasts."""
        return self._plan.limit_minutes * 60 * BUDGET_SHARE - (time.monotonic() - self._began)

    def _stage(self, title: str, stage: Callable[[], Iterable[Row]]) -> None:
        """Add the rows of a stage; an exception becomes a row as well, and does not prevent the other stages."""
        print(f"== {title}", file=sys.stderr, flush=True)
        try:
            for row in stage():
                self._add(row)
        except Exception as error:
            self._add(Row(title, f"{type(error).__name__}: {error}", "it comes to its end", FAILED))

    def _add(self, row: Row) -> None:
        self._report.add(row)
        mark = {PASSED: "ok", FAILED: "FAILED", NOT_CHECKED: "--"}[row.verdict]
        print(self._report.scrub(f"   {mark:<6} {row.check}: {row.found}"), file=sys.stderr, flush=True)

    # ---- stages ------------------------------------------------------------------------------------------------------

    def _up(self) -> Iterator[Row]:
        done = self._commands.run("up", *self._asked.cluster, seconds=min(UP_SECONDS, self._left()))
        self._is_up = done.status == 0
        found = f"up after {done.seconds / 60:.1f} min" if self._is_up else done.why
        yield judged("`launch up`", found, "exit status 0", self._is_up)

    def _status(self) -> dict[str, Any]:
        (found,) = parsed(self._commands.run("status", self._asked.name, "--json", seconds=300, shows=False))
        self._report.scrub.learn([host["name"] for host in found["hosts"] if host["name"] != "head"])
        return dict(found)

    def _nodes(self) -> Iterator[Row]:
        found = self._status()
        hosts = found["hosts"][1:]
        states = [host["state"] for host in hosts]
        yield judged("two nodes run", ", ".join(states) or "none", "running, running", states == ["running"] * 2)
        rate, plan = found["usd_per_hour"], self._plan.usd_per_hour
        yield judged(
            "rate of what was rented",
            "unknown" if rate is None else f"{rate:.3f} USD/h",
            f"the plan's {plan:.3f} USD/h",
            rate is not None and abs(rate - plan) < 0.02 * plan,
        )
        addresses = [host["address"] for host in hosts if host.get("address")]
        if not addresses:
            raise RuntimeError("no node has an address")
        facts, nccl = nodes.probe(shlex.split(found["ssh"]), addresses)
        yield from nodes.rows(facts, nccl, any(vm["spot"] for vm in self._cloud.workers()))

    def _blob(self) -> Iterator[Row]:
        title, asked = "Blob run root", "a run is written there and read here"
        if self._asked.blob is None:
            yield not_checked(title, "no container was named; --blob abfss://… names one", asked)
            return
        print("The cluster may write to the container once you have run:", file=sys.stderr)
        for line in self._cloud.role_lines(self._asked.blob):
            print(f"  {line}", file=sys.stderr, flush=True)
        words = [f"run.root={self._asked.blob}", "run.name=acceptance-blob", "trainer.steps=20"]
        for attempt in range(BLOB_ATTEMPTS):
            if attempt:
                time.sleep(BLOB_PAUSE)
            done = self._commands.run("train", *self._asked.train, *words, seconds=min(900.0, self._left()))
            if done.status == 0 or self._left() < BLOB_PAUSE:
                break
        listed = self._commands.run("runs", f"run.root={self._asked.blob}", "--json", seconds=120, shows=False)
        read = listed.status == 0 and "acceptance-blob" in listed.out
        found = "written and read" if done.status == 0 and read else f"{done.why} {'' if read else listed.why}"
        yield judged(title, found, asked, done.status == 0 and read)

    def _idle(self) -> Iterator[Row]:
        began, limit = time.monotonic(), min(self._asked.idle_minutes * 60 + IDLE_SECONDS, self._left())
        while (count := len(self._cloud.workers())) and time.monotonic() - began < limit:
            time.sleep(POLL_SECONDS)
        yield judged(
            "autoscaling to zero",
            f"{count} nodes after {(time.monotonic() - began) / 60:.1f} min without work",
            f"0 nodes; cluster.idle_minutes={self._asked.idle_minutes:g}",
            count == 0,
        )

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _close(self) -> Iterator[Row]:
        self._commands.end()
        return iter(())

    def _down(self) -> Iterator[Row]:
        for _ in range(DOWN_ATTEMPTS):
            done = self._commands.run("down", self._asked.name, "--force", seconds=DOWN_SECONDS)
            if done.status == 0 or not self._cloud.exists():
                break
        removed = "there was nothing left to remove" if done.status else f"removed in {done.seconds / 60:.1f} min"
        gone = done.status == 0 or not self._cloud.exists()
        yield judged("`launch down`", removed if gone else done.why, "the cluster is removed", gone)

    def _gone(self) -> Iterator[Row]:
        exists = self._cloud.exists()
        left = ", ".join(self._cloud.left()) if exists else ""
        found = f"it exists, with {left or 'nothing in it'}" if exists else "Azure has no such group"
        yield judged("the resource group is gone", found, "Azure has no such group", not exists)
        if exists:
            print(f"REMOVE IT BY HAND: the resource group {self._cloud.group} costs money.", file=sys.stderr)

    def _bill(self) -> Iterator[Row]:
        minutes = (time.monotonic() - self._began) / 60
        usd = self._plan.usd_per_hour * minutes / 60
        plan = self._plan
        yield judged(
            "time of all",
            f"{minutes:.1f} min",
            f"about {plan.minutes:.0f} min, at most {plan.limit_minutes:.0f}",
            minutes <= min(1.5 * plan.minutes, plan.limit_minutes),
        )
        yield judged(
            "cost of all",
            f"at most {usd:.2f} USD: the plan's rate over {minutes:.1f} min",
            f"cluster.budget_usd={plan.budget_usd:g}",
            usd <= plan.budget_usd,
        )
        yield not_checked(
            "Azure's bill",
            "Azure shows it a day later, in Cost Management, for the resource group of the cluster",
            f"at most {usd:.2f} USD, and disks, addresses and traffic",
        )


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the stages as Ctrl-C does, so that the cluster is removed."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Protect the removal from interruption."""

    def refuse(number: int, frame: Any) -> None:
        print("The cluster is being removed; this is not interrupted.", file=sys.stderr, flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, refuse) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
