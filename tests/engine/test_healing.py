"""A run that heals in place: workers are killed and replaced, and nobody can tell from what was learned."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import torch

from launcher.engine import entry
from launcher.engine import runtime as engine_runtime
from launcher.engine.membership import Member, Membership
from launcher.engine.runtime import Runtime
from launcher.runs import RunDirectory
from tests.engine import engine_toys as toys
from tests.engine.engine_ranks import assert_same_run, logged, make_job, result_of, succeed

PACE = 0.02  # seconds of a step
_SERVER = multiprocessing.get_context("forkserver")


@dataclass
class Folder:
    """A store of one file a key, that outlives every process."""

    path: Path

    def put(self, key: str, value: str) -> None:
        part = self.path / f".{os.getpid()}-{time.monotonic_ns()}"
        part.write_text(value)
        with suppress(FileExistsError):
            os.link(part, self.path / quote(key, safe=""))
        part.unlink()

    def get(self, key: str) -> str | None:
        file = self.path / quote(key, safe="")
        return file.read_text() if file.exists() else None

    def keys(self, prefix: str) -> list[str]:
        return [key for key in map(unquote, os.listdir(self.path)) if key.startswith(prefix)]


@dataclass
class Deaths:
    """The engine's control of one worker, which dies when `step` begins, or where the `moment` of it comes."""

    step: int | None = None
    moment: str = "begin"
    pace: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0

    def requests(self) -> frozenset[str]:
        time.sleep(self.pace)
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def _die_in(deaths: Deaths) -> None:
    from launcher.engine.healing import HealingTrainer

    def dying(name: str, before: bool) -> None:
        original = getattr(HealingTrainer, name)

        def method(self: Any, *arguments: Any) -> Any:
            here = deaths.step is not None and self.progress.step + before >= deaths.step
            if here and before:
                os.kill(os.getpid(), signal.SIGSTOP if deaths.moment == "hang" else signal.SIGKILL)
                deaths.step = None  # where it was only stopped
            answer = original(self, *arguments)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        setattr(HealingTrainer, name, method)

    name, before = {
        "begin": ("_step", True),
        "hang": ("_step", True),
        "backward": ("_record", True),
        "before the vote": ("_commit", True),
        "committed": ("_after_step", False),
        "evaluating": ("_evaluate", False),
        "saving": ("_save_step", False),
    }[deaths.moment]
    dying(name, before)


def _worker(
    slot: int, workers: int, folder: str, answer: str, task: entry.Task, deaths: Deaths, timeout: float
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    _die_in(deaths)
    engine_runtime.COLLECTIVE_TIMEOUT = timedelta(seconds=timeout)
    given: dict[str, Any] = {"slot": slot}
    membership = Membership(Folder(Path(folder)), slot, workers, "127.0.0.1", "secret")
    runtime = Runtime.healing(membership, slot, workers, "cpu")
    try:
        given["result"] = entry.run(task, runtime, deaths)
        given["rank"] = runtime.rank
    except Exception as error:
        given["error"] = f"{type(error).__name__}: {error}"
    membership.close()
    given["record"] = toys.RECORD
    given["weights"] = {name: value.detach().clone() for name, value in toys.MODELS[-1].state_dict().items()}
    Path(f"{answer}.part").write_bytes(pickle.dumps(given))
    os.replace(f"{answer}.part", answer)


def heal(
    job: Any,
    directory: Path,
    workers: int,
    deaths: list[tuple[int, int, str]],
    replace: bool = True,
    timeout: float = 60,
) -> Any:
    """Run the job with `workers` workers; (slot, step, moment) say who is killed when.

    One that hangs is woken after 10 s. timeout: seconds that a collective operation may take. Returns what each
    process gave.
    """
    run = RunDirectory(directory)
    run.create()
    folder = directory / "store"
    folder.mkdir()
    task = entry.Task("train", job, str(directory), [], time.time())
    pending = {slot: [(step, moment) for who, step, moment in deaths if who == slot] for slot in range(workers)}
    started = 0

    def start(slot: int) -> Any:
        nonlocal started
        started += 1
        step, moment = pending[slot].pop(0) if pending[slot] else (None, "begin")
        process = _SERVER.Process(
            target=_worker,
            args=(
                slot,
                workers,
                str(folder),
                str(folder.parent / f"answer-{started}"),
                task,
                Deaths(step, moment, PACE),
                timeout,
            ),
        )
        process.start()
        if moment == "hang":
            hung.append(process)
        return process

    hung: list[Any] = []
    processes = {slot: start(slot) for slot in range(workers)}
    began = time.monotonic()
    while processes:
        assert time.monotonic() < began + 60, f"slots {sorted(processes)} had not ended"
        while hung and time.monotonic() > began + 10:
            os.kill(hung.pop().pid, signal.SIGCONT)
        for slot, process in list(processes.items()):
            if process.exitcode is None:
                continue
            del processes[slot]
            if process.exitcode == -signal.SIGKILL and replace:
                processes[slot] = start(slot)
        time.sleep(0.02)
    answers = [pickle.loads(file.read_bytes()) for file in sorted(directory.glob("answer-*")) if file.suffix != ".part"]
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return answers


EVERY_MOMENT = [
    (1, 7, "begin"),
    (0, 14, "backward"),
    (2, 21, "before the vote"),
    (0, 28, "committed"),
    (1, 35, "evaluating"),
    (0, 42, "saving"),
]


def test_workers_that_die_at_any_moment_are_replaced_and_no_bit_differs(tmp_path: Path) -> None:
    job = make_job(epochs=6, deterministic=True, checkpoint={"every": 7}, evaluate_every=7)
    succeed(job, tmp_path / "whole", 3)
    answers = heal(job, tmp_path / "healed", 3, EVERY_MOMENT)
    assert_same_run(tmp_path / "whole", tmp_path / "healed")
    result = result_of(tmp_path / "healed")
    assert (result["status"], result["steps"], result["samples"]) == ("completed", 66, 6 * 1037)
    assert result["restarts"] == len(EVERY_MOMENT)
    assert result["lost_steps"] <= len(EVERY_MOMENT)
    assert answers


def test_the_others_go_on_alone_when_nobody_is_replaced(tmp_path: Path) -> None:
    job = make_job(steps=30, checkpoint={"every": 100})
    succeed(job, tmp_path / "whole", 3)
    answers = heal(job, tmp_path / "healed", 3, [(0, 8, "committed"), (2, 16, "backward")], replace=False)
    whole, healed = logged(tmp_path / "whole"), logged(tmp_path / "healed")
    assert whole.keys() == healed.keys()
    for step in range(1, 21):  # afterwards rounding makes a difference that grows
        assert whole[step]["samples"] == healed[step]["samples"]
        assert whole[step]["train/loss"] == pytest.approx(healed[step]["train/loss"], abs=1e-5), step
        assert whole[step]["train/grad_norm"] == pytest.approx(healed[step]["train/grad_norm"], rel=1e-3), step
    result = result_of(tmp_path / "healed")
    assert result["world_sizes"] == [3, 2, 1]
    assert [answer["slot"] for answer in answers] == [1]


def test_who_lost_everybody_goes_on_from_the_disk(tmp_path: Path) -> None:
    job = make_job(steps=30, deterministic=True, checkpoint={"every": 5})
    succeed(job, tmp_path / "whole", 2)
    heal(job, tmp_path / "healed", 2, [(0, 12, "begin"), (1, 12, "begin")])
    assert_same_run(tmp_path / "whole", tmp_path / "healed")


@pytest.mark.slow
def test_who_hung_and_wakes_up_is_let_in_again(tmp_path: Path) -> None:
    job = make_job(steps=300, deterministic=True, checkpoint={"every": 100})
    succeed(job, tmp_path / "whole", 3)
    answers = heal(job, tmp_path / "healed", 3, [(1, 20, "hang")], timeout=2)
    assert_same_run(tmp_path / "whole", tmp_path / "healed")
    assert result_of(tmp_path / "healed")["world_sizes"][:3] == [3, 2, 3]  # under load others may seem to hang
    assert len(answers) == 3


def test_a_door_answers_only_who_knows_the_secret() -> None:
    store, other = _Memory(), _Memory()
    one = Membership(store, 0, 1, "127.0.0.1", "secret")
    stranger = Membership(other, 0, 1, "127.0.0.1", "guess")
    runtime = Runtime.healing(one, 0, 1, "cpu")
    try:
        assert (runtime.rank, runtime.world_size, runtime.alone) == (0, 1, True)
        me = Member.of(json.dumps(json.loads(store.content["generation/0"])[0]))
        assert one._lives(me)
        assert not stranger._lives(me)
    finally:
        one.close()
        stranger.close()
    assert not one._lives(me)


class _Memory:
    """A store within this process."""

    def __init__(self) -> None:
        self.content: dict[str, str] = {}

    def put(self, key: str, value: str) -> None:
        self.content.setdefault(key, value)

    def get(self, key: str) -> str | None:
        return self.content.get(key)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.content if key.startswith(prefix)]
