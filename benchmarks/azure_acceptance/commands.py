"""The product's own commands as processes: what a user types, with their output stored beside the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_END_SECONDS = 180.0  # after SIGINT: `launch up` ends Ray's launcher, and `train` saves and stops its run


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def why(self) -> str:
        """Return the end of its output, for a row of the report."""
        return f"exit status {self.status}: {' '.join(self.err.split())[-400:]}"


class Commands:
    """Runs `launch VERB …` in its own directory, so that no project of the user is sent.

    Args:
        directory: where the commands run; their runs are below it.
        logs: a file for each command's standard error. These are not scrubbed and stay on this machine.
    """

    def __init__(self, directory: Path, logs: Path, program: Sequence[str] = (sys.executable, "-m", "launcher")):
        self.directory, self._logs, self._program = directory, logs, list(program)
        self._started: list[Running] = []
        for path in (directory, logs):
            path.mkdir(parents=True, exist_ok=True)

    def run(self, *words: str, seconds: float, shows: bool = True) -> Done:
        """Run a command to its end; after `seconds` it is interrupted as by Ctrl-C. shows: print to the terminal."""
        return self.start(*words, shows=shows).wait(seconds)

    def start(self, *words: str, shows: bool = False) -> Running:
        log = self._logs / f"{len(self._started) + 1:02}-{words[0]}"
        self._started.append(Running([*self._program, *words], self.directory, log, shows))
        return self._started[-1]

    def end(self) -> None:
        """Interrupt every command that still runs, and wait for its end."""
        for running in self._started:
            running.end()


class Running:
    """A running command, in its own session: Ctrl-C reaches only this program, which forwards it."""

    def __init__(self, words: list[str], directory: Path, log: Path, shows: bool) -> None:
        self._began = time.monotonic()
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("w") as out:
            self._process = subprocess.Popen(
                words,
                cwd=directory,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, args=(shows,), daemon=True)
        self._reader.start()

    def _read(self, shows: bool) -> None:
        assert self._process.stderr is not None
        with self._err.open("w") as log:
            for line in self._process.stderr:
                log.write(line)
                log.flush()
                if shows:
                    print(f"  | {line}", end="", file=sys.stderr, flush=True)

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def wait(self, seconds: float) -> Done:
        """Wait for its end, and interrupt it after a time-out."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.end()
        self._reader.join(10)
        return Done(self._process.wait(), self._out.read_text(), self._err.read_text(), time.monotonic() - self._began)

    def end(self) -> None:
        """Interrupt it if it still runs, and wait."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def parsed(done: Done) -> Any:
    """Return the output of a command with --json. Raises RuntimeError if it failed."""
    if done.status:
        raise RuntimeError(done.why)
    return json.loads(done.out)
