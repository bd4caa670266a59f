"""Attacks on a run by other users of this machine and by foreign peers.

Each attack succeeded at commit f746dbe: a rank unpickled data from a peer, the store of a run was open to all users and
on all interfaces, and Ray's files could be replaced by links. In these tests an attacker's code creates a file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.command import LAUNCH, PROJECT, TOY
from tests.support.sockets import Listener, descendants, listeners

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


# ---- a foreign peer -------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def _join(rank: int, store: str) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    return dist.group.WORLD


def _attacker(exchange: str, folder: str) -> None:
    payload = Payload(f"{folder}/mark")
    group = _join(0 if exchange == "broadcast" else 1, f"{folder}/store")
    if exchange == "gather":
        dist.all_gather_object([None, None], payload, group=group)
    elif exchange == "broadcast":
        dist.broadcast_object_list([payload], src=0, group=group)
    else:
        dist.gather_object(payload, dst=0, group=group)


def _victim(exchange: str, folder: str) -> None:
    from launcher.engine.checkpoint import Checkpointer
    from launcher.engine.runtime import Runtime

    rank = 1 if exchange == "broadcast" else 0
    group = _join(rank, f"{folder}/store")
    runtime = Runtime(rank, 2, rank, 2, torch.device("cpu"), group=group, host_group=group)
    try:
        if exchange == "gather":
            runtime.gather({"host": "here"})
        elif exchange == "broadcast":
            runtime.broadcast(None)
        else:
            checkpointer = Checkpointer(f"{folder}/checkpoints", group=group)
            checkpointer.save(1, {"model": {"weight": torch.ones(2)}}, None, asynchronous=False)
    except Exception as error:
        Path(folder, "refused").write_text(repr(error))
    os._exit(0)  # without waiting for a lost peer


@pytest.mark.parametrize("exchange", ["gather", "broadcast", "save"])
def test_what_a_peer_sends_is_not_executed(exchange: str, tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    ranks = [context.Process(target=one, args=(exchange, str(tmp_path))) for one in (_victim, _attacker)]
    for rank in ranks:
        rank.start()
    try:
        ranks[0].join(timeout=240)
        assert ranks[0].exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert not (tmp_path / "mark").exists()
    assert (tmp_path / "refused").exists()


# ---- a local run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalRun:
    """A run of two workers on this machine during its training."""

    ray: Path  # the session's directory
    listeners: list[Listener]


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRun]:
    root = tmp_path_factory.mktemp("runs")
    words = [*TOY, "cluster=local", f"run.root={root}", "run.name=run", "scaling.workers=2"]
    words += ["scaling.cpus_per_worker=0.5", "trainer.steps=1000000", "model.delay=0.1", "logging.tensorboard=false"]
    with (root / "output").open("w") as output:
        driver = subprocess.Popen([str(LAUNCH), *words], stdout=output, stderr=output, cwd=PROJECT)
    try:
        end = time.monotonic() + 400
        while not (root / "run" / "metrics.jsonl").exists() or not (root / "run" / "metrics.jsonl").read_text():
            assert driver.poll() is None, (root / "output").read_text()
            assert time.monotonic() < end, (root / "output").read_text()
            time.sleep(0.2)
        processes = descendants(driver.pid)
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace") for pid in processes]
        session = next(word for one in commands for word in one.split("\0") if word.startswith("--session_dir="))
        yield LocalRun(Path(session.partition("=")[2]), listeners(processes))
    finally:
        for _ in range(2):  # the second one ends it at once
            driver.send_signal(signal.SIGINT)
            time.sleep(0.5)
        driver.wait(timeout=240)


def as_another_user(function: Callable[[], Any]) -> Any:
    """Return what a function returns (as JSON) in a process of another user, or the name of the error it raises."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = function()
        except BaseException as error:
            answer = type(error).__name__
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(child, 0)
    return answer


def test_a_local_run_listens_on_loopback_only(local_run: LocalRun) -> None:
    assert len(local_run.listeners) > 4  # Ray's and gloo's were found
    assert [one for one in local_run.listeners if not one.is_loopback] == []


@as_root
def test_another_user_cannot_join_the_store_of_a_local_run(local_run: LocalRun) -> None:
    def join(port: int) -> bool:
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=3))
            store.set("mark", "1")
            return store.get("mark") == b"1"
        except Exception:
            return False

    def attack() -> list[int]:
        # Some servers answer in a way that the client counts as progress: it retries until the process ends.
        pool = ThreadPoolExecutor(len(local_run.listeners))
        tries = {one.port: pool.submit(join, one.port) for one in local_run.listeners}
        wait(tries.values(), timeout=20)
        return [port for port, joined in tries.items() if joined.done() and joined.result()]

    assert as_another_user(attack) == []


@as_root
def test_another_user_cannot_replace_a_file_of_ray(local_run: LocalRun) -> None:
    victim = local_run.ray / "logs" / "debug_state.txt"
    assert victim.exists()

    def attack() -> str:
        victim.rename(victim.with_suffix(".old"))
        victim.symlink_to("/nowhere")
        return "replaced"

    assert as_another_user(attack) == "PermissionError"


def test_ray_serves_no_metrics_without_a_token(local_run: LocalRun) -> None:
    def get(port: int) -> bytes:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=3) as answer:
                return bytes(answer.read())
        except (OSError, HTTPException):
            return b""

    ports = [one.port for one in local_run.listeners]
    with ThreadPoolExecutor(len(ports)) as pool:
        assert [port for port, page in zip(ports, pool.map(get, ports), strict=True) if b"# HELP" in page] == []
