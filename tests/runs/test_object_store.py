"""Runs on an object store: Azure Blob storage, served by its emulator."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
from pathlib import Path

import pytest

from launcher.runs import mirror
from tests.support.command import TOY, Place
from tests.support.stores import KEY, Container, FaultyProxy


class Machine:
    """A machine with its own cache, on which commands run in this process."""

    def __init__(self, container: Container, here: Place, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.container, self.here, self.monkeypatch, self.cache = container, here, monkeypatch, cache

    def __call__(self, *words: str):  # type: ignore[no-untyped-def]
        for name, value in self.container.environment(self.cache).items():
            self.monkeypatch.setenv(name, value)
        mirror._refreshed.clear()
        return self.here.here(*words, f"run.root={self.container.uri}")

    def copy(self, run: str) -> Path:
        (root,) = (self.cache / "launch" / "roots").iterdir()
        return root / run


@pytest.fixture
def machines(container: Container, here: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Machine]:
    return [Machine(container, here, monkeypatch, tmp_path / name) for name in ("one", "two", "three")]


def test_a_run_on_a_store_continues_on_another_machine(container: Container, machines: list[Machine]) -> None:
    one, two, three = machines
    done = one(*TOY, "run.name=a", "checkpoint.every=2", "checkpoint.keep=2")
    assert done.status == 0, done.err
    assert done.last == f"{container.uri}/a"
    assert container.intact("a") == [6, 8]
    result = container.result("a")
    assert (result["status"], result["checkpoint"]) == ("completed", f"{container.uri}/a/checkpoints/step-00000008")
    assert re.search(r"\] completed .* 8 ", container.read("a/log.txt").decode())
    assert any("events.out.tfevents" in name for name in container.names("a"))

    again = two("--config-dir", "own", "run.name=a", "run.resume=true", "trainer.epochs=3")
    assert again.status == 0, again.err
    assert re.search(r"^(.*\] )?\D* 8\.$", again.err, re.MULTILINE)
    assert container.intact("a") == [10, 12]
    steps = [json.loads(line)["step"] for line in container.read("a/metrics.jsonl").splitlines()]
    assert sorted(set(steps)) == [2, 4, 6, 8, 10, 12]

    # The first machine has an outdated copy of the run that the second continued.
    third = one("--config-dir", "own", "run.name=a", "run.resume=true", "trainer.epochs=4")
    assert re.search(r"^(.*\] )?\D* 12\.$", third.err, re.MULTILINE)
    assert container.intact("a")[-1] == 16

    assert json.loads(three("runs", "--json").out)[0]["steps"] == 16
    assert re.search(r"\] completed .* 16 ", three("logs", "a").out)
    assert "val/loss" in three("evaluate", "a", "--config-dir", "own").out
    assert "val/loss" in container.read("a/evaluations.jsonl").decode()
    assert three("export", "a", "--config-dir", "own").last == f"{container.uri}/a/export"
    assert "a/export/weights.safetensors" in container.names("a")
    like = three("--config-dir", "own", "run.like=a", "checkpoint.load=a", "run.name=b", "trainer.epochs=1")
    assert (like.status, like.last) == (0, f"{container.uri}/b")
    taken = three(*TOY, "run.name=a")
    assert taken.status == 2
    assert f"already exists in {container.uri}" in taken.err

    for name in container.names():
        assert KEY.encode() not in container.read(name), name
    for path in one.cache.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_invalid_requests_are_rejected_before_the_start(container: Container, machines: list[Machine]) -> None:
    one = machines[0]
    missing = Container(container.authority, "missing")
    wrong = Machine(missing, one.here, one.monkeypatch, one.cache)(*TOY)
    assert wrong.status == 2
    assert "ContainerNotFound" in wrong.err
    assert not any(one.cache.rglob("config.yaml"))


def test_a_damaged_newest_checkpoint_is_skipped(container: Container, machines: list[Machine]) -> None:
    one, two, _ = machines
    assert one(*TOY, "run.name=a", "checkpoint.every=2", "checkpoint.keep=3").status == 0
    damaged = "a/checkpoints/step-00000008/data-00000.bin"
    content = bytearray(container.read(damaged))
    content[5] ^= 1
    container.write(damaged, bytes(content))
    container.write("a/checkpoints/step-00000006/manifest.json", b"")  # empty: incomplete
    again = two("--config-dir", "own", "run.name=a", "run.resume=true", "trainer.epochs=3")
    assert again.status == 0, again.err
    assert re.search(r" 1 .*\(step-00000008: data-00000\.bin .*\); .*step-00000004\b", " ".join(again.err.split()))


class Evil:
    """Creates a directory when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_planted_files_on_the_store_execute_and_overwrite_nothing(
    container: Container, machines: list[Machine], tmp_path: Path
) -> None:
    one, two, _ = machines
    assert one(*TOY, "run.name=a", "checkpoint.every=4", "checkpoint.keep=2").status == 0
    mark = tmp_path / "executed"
    evil = pickle.dumps(Evil(mark))
    base = "a/checkpoints/step-00000008"
    listed = json.loads(container.read(f"{base}/manifest.json"))
    for place, name in (("00000020", "../../../../../stolen"), ("00000024", "/tmp/stolen"), ("00000028", ".metadata")):
        forged = {**listed, "files": {**listed["files"], name: {"size": len(evil), "xxh128": "0" * 32}}}
        container.write(f"a/checkpoints/step-{place}/manifest.json", json.dumps(forged).encode())
        container.write(f"a/checkpoints/step-{place}/.metadata", evil)
    for name in ("metadata.json", "state.json", "data-00000.bin", ".metadata"):
        container.write(f"a/checkpoints/step-00000032/{name}", evil)
    container.write("a/checkpoints/step-00000032/manifest.json", evil)
    container.write("a/checkpoints/step-00000008/.metadata", evil)

    before = {path for path in tmp_path.rglob("*") if two.cache not in path.parents}
    again = two("--config-dir", "own", "run.name=a", "run.resume=true", "trainer.epochs=10")
    assert again.status == 0, again.err
    note = " ".join(again.err.split())
    assert re.search(r" 4 \w+ \S+ \(step-", note)
    assert "'../../../../../stolen'" in note
    assert re.search(r" 8\. ", note)
    assert not mark.exists()
    assert not any("stolen" in str(path) for path in tmp_path.rglob("*"))
    assert {path for path in tmp_path.rglob("*") if two.cache not in path.parents} <= before | {two.cache}
    assert not any(path.name == ".metadata" for path in two.cache.rglob("*"))
    pickle.loads(evil)
    assert mark.exists(), "the planted pickle has no effect, so this test proves nothing"


def test_a_killed_run_resumes_from_an_empty_cache_and_is_stopped_remotely(
    container: Container, machines: list[Machine], place: Place, tmp_path: Path
) -> None:
    root = f"run.root={container.uri}"
    slow = ("model.delay=0.05", "trainer.steps=2000", "checkpoint.every=5", "trainer.log_every=5", "checkpoint.keep=2")
    env = container.environment(tmp_path / "dead")
    first = place.start(*TOY, root, "run.name=k", *slow, env=env)
    try:
        first.wait_until(lambda: container.has_checkpoint("k"))
        first.signal(signal.SIGKILL)
    finally:
        first.close()
    left = container.read("k/result.json")
    assert not left or json.loads(left)["status"] == "running"  # empty if it was being written

    env = container.environment(tmp_path / "alive")
    second = place.start("--config-dir", "own", root, "run.name=k", "run.resume=true", env=env)
    try:
        second.wait_for("step 20/", 240)
        stopped = machines[2]("stop", "k")
        assert stopped.status == 0, stopped.err
        assert second.finish(30).status == 0
    finally:
        second.close()
    assert container.result("k")["status"] == "stopped"
    steps = [json.loads(line)["step"] for line in container.read("k/metrics.jsonl").splitlines()]
    assert steps == sorted(set(steps))
    assert container.intact("k")[-1] == container.result("k")["steps"]


def test_one_request_in_ten_fails(container: Container, place: Place, tmp_path: Path) -> None:
    proxy = FaultyProxy(container.authority, every=10)
    env = container.environment(tmp_path / "cache", proxy.authority)
    words = (*TOY, f"run.root={container.uri}", "run.name=f", "checkpoint.every=4", "checkpoint.keep=9")
    done = place.launch(*words, seconds=110, **env)
    assert done.status == 0, done.err
    assert proxy.failed >= 3
    assert container.result("f")["status"] == "completed"
    assert container.intact("f") == [4, 8]
    proxy.shutdown()


@pytest.mark.slow
def test_one_request_in_ten_fails_on_ray_with_many_checkpoints(
    container: Container, place: Place, tmp_path: Path
) -> None:
    proxy = FaultyProxy(container.authority, every=10)
    env = container.environment(tmp_path / "cache", proxy.authority)
    own = ("cluster=local", "scaling.workers=2", "model.delay=0.2", "trainer.steps=400", "checkpoint.every=40")
    words = (*TOY, f"run.root={container.uri}", "run.name=f", "checkpoint.keep=99", *own)
    done = place.launch(*words, seconds=500, **env)
    assert done.status == 0, done.err
    assert proxy.failed >= 20
    steps = container.intact("f")
    assert steps[-1] == 400
    assert len(steps) >= 5
    proxy.shutdown()


@pytest.mark.slow  # the Azure client has its own retries
def test_an_unreachable_store_at_the_end_is_reported_and_the_local_copy_remains(
    container: Container, place: Place, tmp_path: Path
) -> None:
    proxy = FaultyProxy(container.authority, every=10**9)
    env = {**container.environment(tmp_path / "cache", proxy.authority), "LAUNCH_STORE_PATIENCE": "1"}
    words = ("model.delay=0.05", "trainer.steps=60", "checkpoint.every=20", "trainer.log_every=10")
    running = place.start(*TOY, f"run.root={container.uri}", "run.name=g", *words, env=env)
    try:
        running.wait_for("step 10/")
        proxy.down = True
        done = running.finish(110)
    finally:
        running.close()
        proxy.shutdown()
    assert done.status == 1
    assert re.search(r" 60 .* run\.resume=true", " ".join(done.err.split()))
    (kept,) = (tmp_path / "cache").rglob("step-00000060")
    assert str(kept) in done.err.replace("\n", "")

    more = ("--config-dir", "own", f"run.root={container.uri}", "run.name=g", "run.resume=true", "trainer.steps=70")
    again = place.launch(*more, seconds=90, **container.environment(tmp_path / "cache"))
    assert again.status == 0, again.err
    assert re.search(r"^(.*\] )?\D* 60\.$", again.err, re.MULTILINE)
    assert container.intact("g")[-1] == 70
