"""Running `launch` as a user does, as a process in a directory of its own, or in this process where that is enough."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import limit

PROJECT = Path(__file__).resolve().parents[1] / "project"
LAUNCH = Path(sys.executable).with_name("launch")
TOY = ("--config-dir", "own", "experiment=toy")  # 8 steps of a straight line, in this process


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of standard output."""
        return self.out.splitlines()[-1] if self.out else ""


class Running:
    """A running command with its own process group, like a command of a shell."""

    def __init__(self, arguments: list[str], cwd: Path, env: dict[str, str], terminal: bool) -> None:
        self.shown = ""  # what came on standard error, or on the terminal
        self._master: int | None = None
        if terminal:
            self._master, slave = pty.openpty()
            streams: dict[str, Any] = {"stdin": slave, "stderr": slave}
            streams["preexec_fn"] = lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0)  # so that Ctrl-C is one
        else:
            streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        self._out = (cwd / f".out-{time.monotonic_ns()}").open("w+")
        self.process = subprocess.Popen(
            arguments, cwd=cwd, env=env, stdout=self._out, start_new_session=True, **streams
        )
        if terminal:
            os.close(slave)
            assert self._master is not None
            self._from = self._master
        else:
            assert self.process.stderr is not None
            self._from = self.process.stderr.fileno()

    @property
    def plain(self) -> str:
        """What was shown, without colours, and without what the bar drew over."""
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", lambda m: "\r" if m[0].endswith("K") else "", self.shown)
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines.split("\n"))

    def wait_for(self, text: str, seconds: float = 60) -> None:
        self._read_until(lambda: text in self.shown, seconds, f"{text!r} was not shown")

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        self._read_until(condition, seconds, "it did not come to it")

    def type(self, text: str) -> None:
        assert self._master is not None
        os.write(self._master, text.encode())

    def signal(self, number: signal.Signals) -> None:
        """Signal the process group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self, seconds: float = 60) -> Result:
        self._read_until(lambda: False, seconds, "it did not end", to_the_end=True)
        status = self.process.wait(timeout=240)
        self._out.seek(0)
        result = Result(status, self._out.read(), self.shown)
        self.close()
        return result

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=240)
        self._out.close()
        with contextlib.suppress(OSError):
            os.unlink(self._out.name)

    def _read_until(
        self, condition: Callable[[], bool], seconds: float, complaint: str, to_the_end: bool = False
    ) -> None:
        deadline = time.monotonic() + limit(seconds)
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{complaint} within {seconds:g} s:\n{self.plain[-3000:]}")
            if not select.select([self._from], [], [], 0.1)[0]:
                continue
            try:
                chunk = os.read(self._from, 65536)
            except OSError:  # a terminal whose last user has gone
                chunk = b""
            if not chunk:
                if to_the_end or condition():
                    return
                raise AssertionError(f"{complaint}, and the command has ended:\n{self.plain[-3000:]}")
            self.shown += chunk.decode(errors="replace")


@dataclass
class Place:
    """A user's directory with a model and data of their own, and an empty home."""

    directory: Path
    home: Path
    capture: Any = None

    @property
    def runs(self) -> Path:
        return self.directory / "runs"

    def launch(self, *words: str, seconds: float = 90, **env: str) -> Result:
        """Run the command to its end."""
        running = self.start(*words, env=env)
        try:
            return running.finish(seconds)
        finally:
            running.close()

    def start(
        self,
        *words: str,
        terminal: bool = False,
        before: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Running:
        """Start the command. `before`: the command to start instead of launch, such as torchrun."""
        environment = {**os.environ, "HOME": str(self.home), "PYTHONUNBUFFERED": "1", **(env or {})}
        arguments = [*before, *words] if before else [str(LAUNCH), *words]
        return Running(arguments, self.directory, environment, terminal)

    def here(self, *words: str) -> Result:
        """Run the command in this process: no second to import PyTorch, but no process of its own either."""
        from launcher import cli

        self.capture.readouterr()
        status = cli.run(words)
        captured = self.capture.readouterr()
        return Result(status, captured.out, captured.err)

    def result(self, run: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.runs / run / "result.json").read_text())
        return content

    def files(self) -> set[str]:
        """Return the files of the directory, two levels deep, without those of the project."""
        found = {path.relative_to(self.directory).as_posix() for path in self.directory.glob("*")}
        found |= {path.relative_to(self.directory).as_posix() for path in self.directory.glob("*/*")}
        brought = {path.relative_to(PROJECT).as_posix() for path in (*PROJECT.glob("*"), *PROJECT.glob("*/*"))}
        return {name for name in found - brought if "__pycache__" not in name}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """For commands as processes."""
    directory = tmp_path / "a user's place"
    shutil.copytree(PROJECT, directory, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    return Place(directory, tmp_path / "home")


@pytest.fixture
def here(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Place]:
    """For commands in this process: one directory for all tests, since modules are imported once; runs are removed."""
    base = tmp_path_factory.getbasetemp() / "in-process"
    directory, home = base / "place", base / "home"
    if not base.exists():
        shutil.copytree(PROJECT, directory, ignore=shutil.ignore_patterns("__pycache__"))
        home.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(home))
    yield Place(directory, home, capfd)
    shutil.rmtree(directory / "runs", ignore_errors=True)
    for path in directory.rglob("*"):  # what the test added to the project is not there for the next one
        if path.is_file() and "__pycache__" not in path.parts and not (PROJECT / path.relative_to(directory)).exists():
            path.unlink()
