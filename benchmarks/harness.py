"""What every benchmark shares: running systems in turn. What becomes of their figures is in `figures.py`."""

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
    """A system that was to be measured did not do its work."""


# ---- running --------------------------------------------------------------------------------------------------------


class Running:
    """A system: a command, given from the repository's root, whose output goes to a file in `folder`.

    `ready` and `turn` are for those with a stopwatch (benchmarks/timed.py), which connects to `port`.
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
        """Wait until the system has warmed up and rests. Returns what it says of itself.

        Raises:
            Failed: it ended before, or took too long.
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
        """Let the system compute for a turn. Returns its `seconds` and `cpu` seconds."""
        self._say("go\n")
        return self._hear()

    def release(self) -> None:
        """Let the system go on to its end."""
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
            raise self._failure(f"went on for more than {self._timeout:g} s") from None
        if status != 0:
            raise self._failure(f"ended with {status}")

    def close(self) -> None:
        """End the system if it still runs: first with a request, for torchrun's workers are in groups of their own."""
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
    """A system to be started in a folder of its own, and ended at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as own:
        system = Running(folder or Path(own), timeout)
        try:
            yield system
        finally:
            system.close()


def run(
    command: Sequence[str], folder: Path, timeout: float = 300, environment: Mapping[str, str] | None = None
) -> None:
    """Run a command from the repository's root to its end; what it says goes to `folder`/output.txt.

    Raises:
        Failed: it ended with another status than 0 or took too long; the message ends with what it said last.
    """
    with running(folder, timeout) as system:
        system.start(command, environment)
        system.finish()


def surroundings() -> dict[str, str]:
    """The environment of every system: one thread a worker, as torchrun has it; no news sent, no other Ray joined."""
    ours = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS", "LAUNCH_CONFIG_DIR"):
        ours.pop(name, None)
    return ours | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


def torchrun(workers: int, *words: str) -> list[str]:
    """A command that starts `workers` processes here."""
    # --standalone: the system picks the port, so that several may run at once.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), *words]


def interleave(
    systems: Mapping[str, Measure], rounds: int, say: Callable[[str], None], pause: float = 0.0
) -> dict[str, list[Figures]]:
    """Run every system once a round, so that whatever else the machine does meets all of them.

    pause: seconds of rest before each.
    """

    def measure(name: str) -> Figures:
        time.sleep(pause)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            return systems[name](Path(folder))

    return in_turn(list(systems), measure, rounds, say)


@dataclass(frozen=True)
class Turns:
    """What a system with a stopwatch is told: steps before its first turn, and in a turn those left out and timed."""

    rounds: int
    warm_up: int
    skipped: int
    steps: int
    systems: int = 1

    def word(self, port: int) -> str:
        """The argument `turns` of benchmarks/timed.py, as Hydra reads it."""
        return f"[{port},{self.warm_up},{self.skipped},{self.steps}]"

    @property
    def total(self) -> int:
        """Steps that a system must make: those of all turns (`take_turns`), and a few for the end of the last one."""
        return self.warm_up + (self.systems + self.rounds) * (self.skipped + self.steps) + 5


# Gives the command of a system, told what its stopwatch is told and in which folder it may write.
Command = Callable[[str, Path], Sequence[str]]


def take_turns(
    systems: Mapping[str, Command], turns: Turns, say: Callable[[str], None], conclude: Callable[[Path], Figures]
) -> tuple[dict[str, list[Figures]], dict[str, Figures]]:
    """Start all systems, then let one after the other compute for a few seconds, round after round.

    All of them are there at the same time and one computes while the others rest. So the figures of a round are taken
    within seconds of each other, by processes that are warm.

    Args:
        conclude: finds out more of a system, from its folder, when it has ended.

    Returns:
        (the turns of each system, `seconds` and `cpu`; what each says of itself, and `conclude` of it)

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
            # A turn that is not kept: workers that wait for rank 0 must not take it for lost while the others start.
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
    """Measure each once a round. Every round begins with another: none is always first, or last."""
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
    """The arguments that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"how often each is measured (default {rounds})")
    made.add_argument("--json", metavar="FILE", help="write the result here as well, for programs")
    return made
