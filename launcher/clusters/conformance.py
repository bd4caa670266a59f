"""The conformance suite for cluster kinds: those of launch and those of other packages.

    check(Harness(words=["cluster=local"], bad=[["cluster.keep_minutes=-1"]], directory=project, …), record(reference))

The suite compares a run on the kind with the same run on a reference kind: logged values, result and exit statuses must
be equal, and nothing may be left afterwards. It runs the `launch` command, so all that it needs from a kind are the
overrides that select it.
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

_RESULT_KEYS = ("status", "reason", "error", "steps", "epochs", "samples", "restarts", "lost_steps")


@dataclass(frozen=True)
class Harness:
    """The commands with which the suite tests a kind.

    Attributes:
        words: overrides that select a cluster of the kind, for one small run.
        bad: lists of overrides; the kind must reject each list when it is added to `words`.
        directory: the current directory of the commands.
        job: overrides of a deterministic run of a few seconds, without run.name and number of workers.
        long: overrides that make `job` run until it is stopped.
        failing: overrides that make `job` fail after it has started.
        environment: environment variables of the commands.
        left: returns the names of processes and files that a run has left on the machines of the kind.
        down: the name of a cluster that `launch down` removes at the end; None for kinds that create none.
        seconds: the time limit of each command.
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
        """Run `launch` with these arguments and wait for its end."""
        return subprocess.run(**self._call(words), capture_output=True, text=True, timeout=self.seconds)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start `launch` with these arguments in a new session."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(**self._call(words), **quiet, start_new_session=True)  # type: ignore[call-overload]

    def _call(self, words: Sequence[str]) -> dict[str, Any]:
        environment = {**os.environ, **self.environment}
        return {"args": [sys.executable, "-m", "launcher", *words], "cwd": self.directory, "env": environment}


@dataclass(frozen=True)
class RunOutcome:
    """The parts of a run that are compared: exit status, fields of result.json, and the values logged at each step."""

    status: int
    facts: dict[str, Any]
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Reference:
    """The outcomes of a run and of a failing run on a kind that is known to be correct."""

    completed: RunOutcome
    failed: RunOutcome


def record(harness: Harness) -> Reference:
    """Run the job and the failing job of a harness, so that other kinds can be compared with it.

    Args:
        harness: of a kind that is known to be correct, such as `cluster=none`, with the job of the kinds to be tested.
    """
    return Reference(_train(harness, "completed"), _train(harness, "failed", *harness.failing))


def check(harness: Harness, reference: Reference) -> None:
    """Run the whole suite on a kind.

    Args:
        harness: of the kind that is tested.
        reference: what `record` returned for the same job.

    Raises:
        AssertionError: names the difference.
    """
    check_requests(harness)
    check_run(harness, reference)
    check_failure(harness, reference)
    check_stop(harness)
    check_down(harness)


def check_requests(harness: Harness) -> None:
    """Run the quick part of the suite, which trains nothing."""
    check_plan(harness)
    check_bad_keys(harness)


def check_plan(harness: Harness) -> None:
    """Check that `launch plan` works and creates nothing."""
    before, left = _files(harness.directory), [*harness.left()]
    done = harness.launch("plan", *harness.job, *harness.words, "run.name=planned", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "planned", done.stdout
    assert _files(harness.directory) == before, "launch plan wrote files"
    assert [*harness.left()] == left, "launch plan created something"


def check_bad_keys(harness: Harness) -> None:
    """Check that bad keys and values cause exit status 2 and one paragraph, before a run directory exists."""
    for words in (*harness.bad, ["cluster.no_such_key=1"], ["cluster.nodes=0"]):
        done = harness.launch("train", *harness.job, *harness.words, "run.name=refused", *words)
        assert done.returncode == 2, f"{words}: exit status {done.returncode}\n{done.stderr}"
        assert done.stdout == "", f"{words}: {done.stdout}"
        assert "Traceback" not in done.stderr, done.stderr
        assert not (_runs(harness) / "refused").exists(), f"{words}: a run directory was made"


def check_run(harness: Harness, reference: Reference) -> None:
    """Check that a run has the same result and logged values as on the reference, and that its log can be read."""
    expected, found = reference.completed, _train(harness, "conformed")
    assert found == expected, f"expected {expected}\nfound {found}"
    assert found.facts["status"] == "completed"
    logs = harness.launch("logs", "conformed")
    assert logs.returncode == 0, logs.stderr
    listed = harness.launch("runs", "--json")
    assert any(row["name"] == "conformed" and row["status"] == "completed" for row in json.loads(listed.stdout)), listed
    assert not [*harness.left()], f"the run has left {harness.left()}"


def check_failure(harness: Harness, reference: Reference) -> None:
    """Check that a failing run has the same exit status and error as on the reference."""
    expected, found = reference.failed, _train(harness, "failing", *harness.failing)
    assert (found.status, found.facts["status"]) == (expected.status, expected.facts["status"]) == (1, "failed")
    assert found.facts["error"] == expected.facts["error"], f"expected {expected}\nfound {found}"


def check_stop(harness: Harness) -> None:
    """Check that `launch stop` saves a checkpoint and stops the run, and Ctrl-C as well with exit status 130."""
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
    """Check that nothing is left, for kinds that create clusters after `launch down`."""
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
    return RunOutcome(done.returncode, {key: result.get(key) for key in _RESULT_KEYS}, exact)


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
