"""A pool of rank processes that run job after job, so that a hundred runs do not start a hundred processes.

Each run has its own process group. Threads, hooks and random states remain in a process from test to test, as in a
worker that trains trial after trial.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.config import Job
from launcher.engine import entry
from launcher.runs import RunDirectory
from tests.support import engine_toys as toys
from tests.support.engine_ranks import _SERVER, Rank, Script, _body
from tests.support.waiting import limit


def _serve(connection: Connection) -> None:
    processors = os.sched_getaffinity(0)
    while (arguments := _next(connection)) is not None:
        toys.MODELS.clear()
        toys.RECORD = []
        _body(*arguments)
        os.sched_setaffinity(0, processors)
        connection.send(None)


def _next(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        return None


class RankPool:
    """A pool of up to `size` ranks, as a context manager."""

    def __init__(self, size: int) -> None:
        self._members: list[tuple[Any, Connection]] = []
        for _ in range(size):
            ours, theirs = _SERVER.Pipe()
            process = _SERVER.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            self._members.append((process, ours))

    def run(
        self, job: Job, directory: Path, workers: int, script: Script | None = None, timeout: float = 120
    ) -> list[Rank]:
        """Run a job like `engine_ranks.launch`."""
        run_directory = RunDirectory(directory)
        run_directory.create()
        run_directory.clear_requests()
        task = entry.Task("train", job, str(directory), [], time.time())
        with tempfile.TemporaryDirectory() as scratch:
            answers = [Path(scratch, str(rank)) for rank in range(workers)]
            for rank, (_, connection) in enumerate(self._members[:workers]):
                connection.send((rank, workers, f"{scratch}/store", str(answers[rank]), task, script or Script(), 1))
            deadline = time.monotonic() + limit(timeout)
            for _, connection in self._members[:workers]:
                assert connection.poll(max(0.0, deadline - time.monotonic())), f"no answer after {timeout} s"
                connection.recv()
            return [pickle.loads(answer.read_bytes()) for answer in answers]

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, connection in self._members:
            connection.close()  # ends a rank that waits for work
            process.join(5)
            process.kill()
            process.join()
