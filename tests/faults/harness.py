"""Runs a job with a fault, and checks the result.

A `Trial` starts `launch` with the job in `project/` (30 steps that record their samples), waits for a step, and applies
a fault. Then `judge` checks that the surviving history has every step once, with the samples of the undisturbed run,
and that the final weights are bit-identical.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.engine.checkpoint import available, newest_intact
from tests.support.command import LAUNCH
from tests.support.engine_ranks import assert_same_weights, final_weights
from tests.support.vmlab.lab import ROOT, Lab
from tests.support.waiting import limit, wait_for

PROJECT = Path(__file__).resolve().parent / "project"
STEPS, EVERY, STEPS_PER_EPOCH, SAMPLES = 30, 4, 6, 72
SAVING = 1  # the most steps that complete while a checkpoint of this job is saved
WORDS = ("--config-dir", "own", "experiment=faults", "run.name=run")


@dataclass
class Attempt:
    """A group of workers, from its start to its end."""

    id: str
    began: float
    first_step: int
    workers: dict[int, dict[str, Any]] = field(default_factory=dict)  # by rank: pid, host
    steps: dict[int, Counter[int]] = field(default_factory=dict)  # by step: how often each sample was used
    times: dict[int, float] = field(default_factory=dict)  # the time at which the last worker completed the step


@dataclass
class Outcome:
    """A row of the table."""

    fault: str
    outcome: str
    lost_steps: int
    seconds: float | None  # from the fault to the first step of the next group
    world_sizes: list[int]
    equal: bool

    def cells(self) -> list[str]:
        seconds = "–" if self.seconds is None else f"{self.seconds:.0f} s"
        sizes = ", ".join(map(str, self.world_sizes))
        return [self.fault, self.outcome, str(self.lost_steps), seconds, sizes, "yes" if self.equal else "NO"]


class Trial:
    """A job in its own directory. With a lab it runs on the head, with `cluster=existing`."""

    def __init__(self, directory: Path, lab: Lab | None = None, *words: str) -> None:
        self.directory = directory / "calling"
        shutil.copytree(PROJECT, self.directory, ignore=shutil.ignore_patterns("__pycache__"))
        self.history = directory / "history"
        self.history.mkdir()
        self.lab = lab
        self.root = self.directory / "runs"
        self.words = [*WORDS, f"callbacks.history.directory={self.history}", *words]
        if lab is not None:
            self.words += ["cluster=existing", f"cluster.address={lab.address}", "scaling.workers=2"]
        self.process: subprocess.Popen[bytes] | None = None
        self.began = time.time()
        self.struck: float | None = None
        self.announced = False  # the fault was announced: it has no effect until the group ends
        self._log = directory / "log"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def result(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run / "result.json").read_text())
        return content

    def start(self, *more: str) -> None:
        words = [str(LAUNCH), *self.words, *more]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if self.lab is not None:
            words, env = self.lab.head.command(words, self.directory), self.lab.head.environment()
        with self._log.open("ab") as sink:
            self.process = subprocess.Popen(
                words,
                cwd=self.directory,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def finish(self, seconds: float = 150) -> int:
        """Wait for the command's end and return its status."""
        assert self.process is not None
        try:
            return self.process.wait(limit(seconds))
        except subprocess.TimeoutExpired:
            self.close()
            raise AssertionError(f"it did not end within {seconds:g} s:\n{self.output()}") from None

    def close(self) -> None:
        """Kill the driver and the workers."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(240)
        for attempt in self.attempts():
            for worker in attempt.workers.values():
                with contextlib.suppress(OSError):
                    if b"ray::" in Path(f"/proc/{worker['pid']}/cmdline").read_bytes():
                        os.kill(worker["pid"], signal.SIGKILL)

    def output(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""

    def attempts(self) -> list[Attempt]:
        """Return the groups of workers, in order of their start."""
        found: dict[str, Attempt] = {}
        for path in sorted(self.history.glob("*.jsonl")):
            lines = []
            for text in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line that is being written
                    lines.append(json.loads(text))
            if not lines:
                continue
            head, steps = lines[0], lines[1:]
            attempt = found.setdefault(head["attempt"], Attempt(head["attempt"], head["time"], head["from"]))
            attempt.workers[head["rank"]] = head
            for line in steps:
                attempt.steps.setdefault(line["step"], Counter()).update(line["rows"])
                attempt.times[line["step"]] = max(line["time"], attempt.times.get(line["step"], 0.0))
        return sorted(found.values(), key=lambda attempt: attempt.began)

    def step(self) -> int:
        """Return the last step of the newest group."""
        attempts = self.attempts()
        return max(attempts[-1].steps, default=0) if attempts else 0

    def wait_until(self, condition: Callable[[], bool], seconds: float = 90, what: str = "") -> None:
        def holds() -> bool:
            if condition():
                return True
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"the command exited with {self.process.returncode}, {what}:\n{self.output()}")
            return False

        wait_for(holds, seconds, lambda: f"{what}:\n{self.output()}")

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Wait until group number `attempt` has completed this step."""
        self.wait_until(
            lambda: len(self.attempts()) >= attempt and self.step() >= step, what=f"waiting for step {step}"
        )

    def wait_for_checkpoint(self, step: int) -> None:
        self.wait_until(lambda: max(available(self.checkpoints), default=0) >= step, what=f"waiting to save {step}")

    def strike(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process, and record the time."""
        self.struck = self.struck or time.time()
        os.kill(pid, number)

    def worker(self, rank: int) -> int:
        """Return the process id of a worker of the newest group."""
        return int(self.attempts()[-1].workers[rank]["pid"])


def surviving(attempts: list[Attempt]) -> dict[int, Counter[int]]:
    """Return the samples of each step, from the last group that completed it."""
    return {step: samples for attempt in attempts for step, samples in attempt.steps.items()}


def lost(attempts: list[Attempt]) -> int:
    """Return the number of steps that were repeated."""
    return sum(len(one.steps) for one in attempts) - len(surviving(attempts))


def judge(trial: Trial, fault: str, status: int, reference: Trial, most_lost: int, how: str = "completed") -> Outcome:
    """Check a run that has ended, and return its row."""
    assert status == 0, f"status {status}:\n{trial.output()}"
    result, attempts = trial.result(), trial.attempts()
    assert (result["status"], result["steps"]) == ("completed", STEPS)
    assert result["seconds"] < time.time() - trial.began + 1, "time was counted twice"
    history, expected = surviving(attempts), surviving(reference.attempts())
    assert sorted(history) == list(range(1, STEPS + 1))
    for step, samples in history.items():
        assert samples == expected[step], f"step {step} used other samples"
    for epoch in range(STEPS // STEPS_PER_EPOCH):
        used: Counter[int] = Counter()
        for step in range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1):
            used.update(history[step])
        assert used == Counter(range(SAMPLES)), f"epoch {epoch}"
    assert_same_weights(final_weights(reference.run), final_weights(trial.run))
    assert lost(attempts) <= most_lost, f"{lost(attempts)} steps were repeated, at most {most_lost} are allowed"
    seconds = None
    if trial.struck is not None and len(attempts) > 1:
        after = [min(one.times.values()) for one in attempts[1:] if one.times and one.began > trial.struck]
        since = max(attempts[0].times.values()) if trial.announced else trial.struck
        seconds = min(after) - since if after else None
    return Outcome(fault, how, lost(attempts), seconds, result["world_sizes"], equal=True)


def failed_in_order(trial: Trial, status: int, message: str) -> None:
    """Check that a run has failed with a reason, and that its newest checkpoint is intact."""
    assert status == 1, f"status {status}:\n{trial.output()}"
    result = trial.result()
    assert result["status"] == "failed"
    assert message.lower() in result["error"].lower(), result["error"]
    newest = newest_intact(trial.checkpoints)
    assert newest.path is not None
