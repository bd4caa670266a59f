"""A terminal, pipe or disk that goes away silences the output of a run, and does not end the run."""

from __future__ import annotations

import fcntl
import gc
import io
import os
import pty
import signal
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.streams import QuietStream
from tests.support.command import LAUNCH, TOY, Place
from tests.support.waiting import limit, wait_for
from tests.test_interrupts import has_steps

RUN = (*TOY, "run.name=a", "trainer.log_every=1", "model.delay=0.05", "model.speak=true")
LONG = (*TOY, "run.name=a", "trainer.steps=100000", "model.delay=0.05", "trainer.log_every=1")
QUIET = "The output can no longer be shown"


def command(place: Place, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HOME": str(place.home), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([LAUNCH, *words], cwd=place.directory, env=environment, **streams)


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to kill after the test, if they still run."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def times_logged(place: Place, run: str = "a") -> int:
    return (place.runs / run / "log.txt").read_text().count(QUIET)


def shell(place: Place, line: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $L is the command."""
    environment = {**os.environ, "HOME": str(place.home), "PYTHONUNBUFFERED": "1", "L": str(LAUNCH)}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=place.directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit(seconds),
    )


class Broken(io.TextIOBase):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_quiet_stream_reports_the_first_failure_only() -> None:
    reasons: list[str] = []
    stream = QuietStream(Broken())  # type: ignore[arg-type]
    stream.on_failure = reasons.append
    assert [stream.write("ab"), stream.write("c")] == [2, 1]
    assert (reasons, stream.failure, stream.isatty()) == (["Broken pipe"], "Broken pipe", False)
    assert QuietStream(None).write("ab") == 2


def test_a_quiet_stream_that_is_deleted_after_its_stream_was_closed() -> None:
    """A notebook replaces its streams; that is no failure of a run that has ended."""
    reasons: list[str] = []
    inner = io.StringIO()
    stream = QuietStream(inner)
    stream.on_failure = reasons.append
    inner.close()
    del stream
    gc.collect()
    assert reasons == []


@pytest.mark.parametrize(
    "cluster",
    [
        "cluster=none",
        "cluster=none data.speak=true data.num_workers=1",  # the loader process prints as well
        "cluster=local",
    ],
)
def test_a_run_survives_head(place: Place, cluster: str) -> None:
    done = shell(place, f"$L {' '.join(RUN)} {cluster} 2>&1 | head -3", 90)
    assert done.returncode == 0, done.stdout
    result = place.result("a")
    assert (result["status"], result["steps"], result["restarts"]) == ("completed", 8, 0)
    assert times_logged(place) == 1


@pytest.mark.parametrize(
    ("redirection", "printed"),
    [
        (">/dev/full", "No space left on device"),
        ("2>/dev/full", ""),
        (">/dev/full 2>&1", ""),
        (">&-", ""),
        ("2>&-", ""),
        (">&- 2>&- <&-", ""),
    ],
)
def test_a_run_survives_full_and_closed_streams(place: Place, redirection: str, printed: str) -> None:
    done = shell(place, f"$L {' '.join(RUN)} {redirection}")
    assert done.returncode == 0, done.stderr
    assert place.result("a")["status"] == "completed"
    assert printed in done.stderr
    assert "bug in launch" not in done.stderr
    if printed:
        assert str(place.runs / "a") in done.stderr, "the result is printed where it can be read"


def test_a_failed_run_keeps_its_exit_status(place: Place) -> None:
    done = shell(place, f"$L {' '.join(RUN)} model.failure=raise model.at=3 2>&1 | head -1")
    assert done.returncode == 1
    assert place.result("a")["status"] == "failed"


def test_a_run_survives_its_terminal(place: Place, ended: list[subprocess.Popen[bytes]]) -> None:
    master, slave = pty.openpty()
    running = command(
        place,
        *RUN,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
    )
    ended.append(running)
    os.close(slave)
    shown = b""
    while b"a line is built" not in shown:
        shown += os.read(master, 4096)
    while not (place.runs / "a/metrics.jsonl").exists():
        os.read(master, 4096)
    os.close(master)  # SIGHUP for the session, and EIO for each write
    assert running.wait(limit(30)) == 0
    assert place.result("a")["status"] == "completed"
    assert times_logged(place) == 1


@pytest.mark.parametrize("cluster", ["none", "local"])
def test_ctrl_c_through_tee_saves_a_checkpoint(
    place: Place, cluster: str, ended: list[subprocess.Popen[bytes]]
) -> None:
    """The terminal signals tee as well, so that the pipe is broken while the run saves its checkpoint."""
    environment = {**os.environ, "HOME": str(place.home), "L": str(LAUNCH)}
    line = f"trap : INT; $L {' '.join(LONG)} cluster={cluster} 2>&1 | tee shown; echo ${{PIPESTATUS[0]}} > status"
    running = subprocess.Popen(
        ["bash", "-c", line], cwd=place.directory, env=environment, start_new_session=True, stdin=subprocess.DEVNULL
    )
    ended.append(running)
    wait_for(has_steps(place), 60)
    os.killpg(running.pid, signal.SIGINT)
    running.wait(limit(30))
    assert (place.directory / "status").read_text() == "130\n"
    result = place.result("a")
    assert (result["status"], result["reason"]) == ("stopped", "signal")
    assert Path(result["checkpoint"]).is_dir()


def test_a_sweep_survives_head(place: Place) -> None:
    words = (*TOY, "-m", "run.name=s", "optimizer.lr=0.1,0.2", "trainer.log_every=1", "model.delay=0.05")
    done = shell(place, f"$L {' '.join(words)} 2>&1 | head -1", 90)
    assert done.returncode == 0, done.stdout
    assert place.result("s")["trials"]["completed"] == 2


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("$L runs --json | head -c 1", 0),
        ("$L plan {toy} | true", 0),
        ("$L sizes --offline | head -1", 0),
        ("$L runs --json >/dev/full", 1),
        ("$L plan {toy} >/dev/full", 1),
        ("$L --help >/dev/full", 1),
    ],
)
def test_verbs_that_only_print(place: Place, line: str, status: int) -> None:
    """A closed pipe is no error; a full disk is one, because the output is the only result."""
    (place.runs / "a").mkdir(parents=True)
    done = shell(place, line.format(toy=" ".join(TOY)))
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert ("Standard output cannot be written" in done.stderr) == bool(status)
