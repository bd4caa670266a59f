"""Shared by all benchmarks: runs systems in turn. `figures.py` processes their figures."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.figures import ROOT, Figures, version

# Runs a system once, in an empty folder, and returns its figures.
Measure = Callable[[Path], Figures]


class Failed(Exception):
    """A measured system did not do its work."""


# ---- running --------------------------------------------------------------------------------------------------------


class Running:
    """A system: a command, run in the repository's root, with its output in a file in `folder`.

    `ready` and `turn` are for systems with a stopwatch (benchmarks/timed.py), which connects to `port`.
    """

    def __init__(self, folder: Path, timeout: float = 300) -> None:
        self.folder = folder
        self._timeout = timeout
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(1.0)
        self.port: int = self._listener.getsockname()[1]
        self._link: TextIO | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._command: Sequence[str] = ()

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = command
        with (self.folder / "output.txt").open("a") as sink:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=surroundings() | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ready(self) -> Figures:
        """Wait until the system has warmed up and is idle. Returns its own description.

        Raises:
            Failed: it exited before, or took too long.
        """
        assert self._process is not None
        latest = time.monotonic() + self._timeout
        while True:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if self._process.poll() is not None or time.monotonic() > latest:
                    raise self._failure("before its first turn") from None
                continue
            connection.settimeout(self._timeout)
            self._link = connection.makefile("rw")
            return self._hear()

    def turn(self) -> Figures:
        """Let the system compute for one turn. Returns its `seconds` and `cpu` seconds."""
        self._say("go\n")
        return self._hear()

    def release(self) -> None:
        """Let the system run to its end."""
        self._say("end\n")

    def finish(self) -> None:
        """Wait for the system's end.

        Raises:
            Failed: it ended with another status than 0 or took too long.
        """
        assert self._process is not None
        try:
            status = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            raise self._failure(f"ran for more than {self._timeout:g} s") from None
        if status != 0:
            raise self._failure(f"ended with {status}")

    def close(self) -> None:
        """Stop the system if it still runs: first with SIGTERM, because torchrun's workers are in their own process
        groups."""
        self._listener.close()
        if self._link is not None:
            self._link.close()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _say(self, word: str) -> None:
        assert self._link is not None
        self._link.write(word)
        self._link.flush()

    def _hear(self) -> Figures:
        assert self._link is not None
        line = ""
        with suppress(OSError):
            line = self._link.readline()
        if not line:
            raise self._failure("broke off")
        return json.loads(line)

    def _failure(self, what: str) -> Failed:
        said = (self.folder / "output.txt").read_text(errors="replace").splitlines()[-60:]
        return Failed(f"{' '.join(map(str, self._command))}\n{what}:\n" + "\n".join(said))


@contextmanager
def running(folder: Path | None = None, timeout: float = 300) -> Iterator[Running]:
    """A system that runs in its own folder, and is stopped at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as own:
        system = Running(folder or Path(own), timeout)
        try:
            yield system
        finally:
            system.close()


def run(
    command: Sequence[str], folder: Path, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command in the repository's root to its end; its output goes to `folder`/output.txt.

    Raises:
        Failed: it ended with another status than 0 or took too long; the message ends with its last output.
    """
    with running(folder, timeout) as system:
        system.start(command, environment)
        system.finish()


def surroundings() -> dict[str, str]:
    """Return the environment of every system: one thread per worker, like torchrun; no usage reports, no other Ray."""
    ours = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS", "LAUNCH_CONFIG_DIR"):
        ours.pop(name, None)
    return ours | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def torchrun(workers: int, *words: str) -> list[str]:
    """Return a command that starts `workers` processes on this machine."""
    # --standalone: the system picks the port, so that several may run at once.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), *words]


def interleave(
    systems: Mapping[str, Measure], rounds: int, say: Callable[[str], None], pause: float = 0.0
) -> dict[str, list[Figures]]:
    """Run every system once per round, so that other load on the machine affects all of them.

    pause: idle seconds before each.
    """

    def measure(name: str) -> Figures:
        time.sleep(pause)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            return systems[name](Path(folder))

    return in_turn(list(systems), measure, rounds, say)


@dataclass(frozen=True)
class Turns:
    """Arguments of a system with a stopwatch: steps before its first turn, and skipped and timed steps of a turn."""

    rounds: int
    warm_up: int
    skipped: int
    steps: int
    systems: int = 1

    def word(self, port: int) -> str:
        """Return the argument `turns` of benchmarks/timed.py in Hydra's syntax."""
        return f"[{port},{self.warm_up},{self.skipped},{self.steps}]"

    @property
    def total(self) -> int:
        """Return the number of steps that a system must run: those of all turns (`take_turns`), and a few for the end
        of the last one."""
        return self.warm_up + (self.systems + self.rounds) * (self.skipped + self.steps) + 5


# Returns the command of a system for the arguments of its stopwatch and its output folder.
Command = Callable[[str, Path], Sequence[str]]


def take_turns(
    systems: Mapping[str, Command], turns: Turns, say: Callable[[str], None], conclude: Callable[[Path], Figures]
) -> tuple[dict[str, list[Figures]], dict[str, Figures]]:
    """Start all systems, then let one after the other compute for a few seconds, round after round.

    All of them run at the same time and one computes while the others are idle. So the figures of a round are measured
    within seconds of each other, by warm processes.

    Args:
        conclude: reads further results of a system from its folder after it has exited.

    Returns:
        (the turns of each system, `seconds` and `cpu`; the description of each, with the result of `conclude`)

    Raises:
        Failed: one of them failed.
    """
    with ExitStack() as stack:
        started: dict[str, Running] = {}
        facts: dict[str, Figures] = {}
        for name, command in systems.items():
            system = started[name] = stack.enter_context(running())
            system.start(command(turns.word(system.port), system.folder))
            facts[name] = system.ready()
            say(f"{name} is warm")
            # An unrecorded turn: workers that wait for rank 0 must not time out while the others start.
            for earlier in started.values():
                earlier.turn()
        found = in_turn(list(systems), lambda name: started[name].turn(), turns.rounds, say)
        for system in started.values():
            system.release()
        for name, system in started.items():
            system.finish()
            facts[name] |= conclude(system.folder)
    return found, facts


def in_turn(
    names: Sequence[str], measure: Callable[[str], Figures], rounds: int, say: Callable[[str], None]
) -> dict[str, list[Figures]]:
    """Measure each once per round. Every round starts with another system, so none is always first or last."""
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            figures = measure(name)
            found[name].append(figures)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, int | float))
            say(f"round {number + 1}/{rounds}  {name}: {shown}")
    return found


def available(*packages: str) -> bool:
    return all(version(package) for package in packages)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments of all benchmarks."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"how often each is measured (default {rounds})")
    made.add_argument("--json", metavar="FILE", help="write the result here as well, for programs")
    return made
