"""One suite that every kind of cluster passes, ours and those of other packages.

    check(Harness(words=["cluster=local"], bad=[["cluster.keep_minutes=-1"]], directory=project, reference=local))

A run with the kind's words is compared with the same run of `reference`: events, result, logs and exit statuses are
alike, and nothing is left afterwards. The suite drives the `launch` command as a user does, so it needs no part of a
kind but its words.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FACTS = ("status", "reason", "error", "steps", "epochs", "samples", "restarts", "lost_steps")  # of result.json


@dataclass(frozen=True)
class Harness:
    """What a kind brings to be checked.

    Attributes:
        words: that choose a cluster of the kind, for one small run.
        bad: words, each list of which the kind refuses when it is added to `words`.
        directory: where commands are given.
        job: words of a deterministic run of some seconds on two workers, without run.name.
        long: words that are added to `job` to make it run until it is stopped.
        failing: words that are added to `job` to make it fail once it has started.
        environment: variables of the commands.
        left: names what a run has left on the kind's machines; empty where it is all gone.
        down: the name of a cluster that `launch down` has to remove at the end; None for kinds that make none.
        seconds: the longest that a command may take.
    """

    words: Sequence[str]
    bad: Sequence[Sequence[str]]
    directory: Path
    job: Sequence[str]
    long: Sequence[str]
    failing: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    left: Callable[[], Sequence[str]] = tuple
    down: str | None = None
    seconds: float = 300.0

    def launch(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(**self._call(words), capture_output=True, text=True, timeout=self.seconds)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(**self._call(words), **quiet, start_new_session=True)  # type: ignore[call-overload]

    def _call(self, words: Sequence[str]) -> dict[str, Any]:
        environment = {**os.environ, **self.environment}
        return {"args": [sys.executable, "-m", "launcher", *words], "cwd": self.directory, "env": environment}


@dataclass(frozen=True)
class RunOutcome:
    """One run as it is compared: its exit status, what result.json says, and what was logged at which step."""

    status: int
    facts: dict[str, Any]
    steps: list[dict[str, Any]]


def check(harness: Harness, reference: Harness) -> None:
    """Put a kind through the suite.

    Args:
        reference: of a kind that is known to be right, with the same job.

    Raises:
        AssertionError: names what differs.
    """
    check_plan(harness)
    check_bad_keys(harness)
    check_run(harness, reference)
    check_failure(harness, reference)
    check_stop(harness)
    check_down(harness)


def check_plan(harness: Harness) -> None:
    """`launch plan` works and creates nothing."""
    before, left = _files(harness.directory), [*harness.left()]
    done = harness.launch("plan", *harness.job, *harness.words, "run.name=planned", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "planned", done.stdout
    assert _files(harness.directory) == before, "launch plan wrote files"
    assert [*harness.left()] == left, "launch plan created something"


def check_bad_keys(harness: Harness) -> None:
    """Bad keys and values end with 2 and one paragraph, before a run directory exists."""
    for words in (*harness.bad, ["cluster.no_such_key=1"], ["cluster.nodes=0"]):
        done = harness.launch("train", *harness.job, *harness.words, "run.name=refused", *words)
        assert done.returncode == 2, f"{words}: exit status {done.returncode}\n{done.stderr}"
        assert done.stdout == "", f"{words}: {done.stdout}"
        assert "Traceback" not in done.stderr, done.stderr
        assert not (_runs(harness) / "refused").exists(), f"{words}: a run directory was made"


def check_run(harness: Harness, reference: Harness) -> None:
    """A run has the events, the result and the log of the same run elsewhere."""
    expected, found = _train(reference, "expected"), _train(harness, "conformed")
    assert found == expected, f"expected {expected}\nfound {found}"
    assert found.facts["status"] == "completed"
    logs = harness.launch("logs", "conformed")
    assert logs.returncode == 0, logs.stderr
    listed = harness.launch("runs", "--json")
    assert any(row["name"] == "conformed" and row["status"] == "completed" for row in json.loads(listed.stdout)), listed
    assert not [*harness.left()], f"the run has left {harness.left()}"


def check_failure(harness: Harness, reference: Harness) -> None:
    """A run that fails has the same exit status and error."""
    expected, found = _train(reference, "failed", *reference.failing), _train(harness, "failing", *harness.failing)
    assert (found.status, found.facts["status"]) == (expected.status, expected.facts["status"]) == (1, "failed")
    assert found.facts["error"] == expected.facts["error"], f"expected {expected}\nfound {found}"


def check_stop(harness: Harness) -> None:
    """`launch stop` has a run save a checkpoint and end; so does Ctrl-C, with exit status 130."""
    for name in ("stopped", "interrupted"):
        process = harness.start("train", *harness.job, *harness.words, *harness.long, f"run.name={name}")
        try:
            _wait(lambda name=name: _lines(_runs(harness) / name / "metrics.jsonl"), process, harness.seconds)  # type: ignore[misc]
            if name == "stopped":
                assert harness.launch("stop", name).returncode == 0
            else:
                os.killpg(process.pid, signal.SIGINT)
            status = process.wait(harness.seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = json.loads((_runs(harness) / name / "result.json").read_text())
        assert result["status"] == "stopped", result
        assert [*(_runs(harness) / name / "checkpoints").glob("step-*")], "no checkpoint was saved"
        assert status == (0 if name == "stopped" else 130), f"{name}: exit status {status}"


def check_down(harness: Harness) -> None:
    """Nothing is left, after `launch down` where the kind makes clusters."""
    if harness.down is not None:
        done = harness.launch("down", harness.down)
        assert done.returncode == 0, done.stderr
    assert not [*harness.left()], f"left: {harness.left()}"


def _train(harness: Harness, name: str, *words: str) -> RunOutcome:
    done = harness.launch("train", *harness.job, *harness.words, f"run.name={name}", *words)
    directory = _runs(harness) / name
    assert (directory / "result.json").is_file(), done.stderr
    assert Path(done.stdout.splitlines()[-1]).name == name, "the last line of standard output is the run's directory"
    result = json.loads((directory / "result.json").read_text())
    rows = [json.loads(line) for line in _lines(directory / "metrics.jsonl")]
    exact = [{key: row[key] for key in row if key == "step" or key.startswith(("train/", "val/"))} for row in rows]
    return RunOutcome(done.returncode, {key: result.get(key) for key in _FACTS}, exact)


def _runs(harness: Harness) -> Path:
    return harness.directory / "runs"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _files(directory: Path) -> set[str]:
    return {str(path) for path in directory.rglob("*") if "__pycache__" not in path.parts}


def _wait(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float) -> None:
    latest = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before it was stopped"
        assert time.monotonic() < latest, "the run did not log a step"
        time.sleep(0.1)
