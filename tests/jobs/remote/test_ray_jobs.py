"""Runs through the Ray Jobs API of an existing cluster, over a network that fails."""

from __future__ import annotations

import csv
import json
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.remote.jobs_cluster import JobsCluster, Network, running
from tests.support.command import Place, Running

SECRET = "pLaNtEd-5f2c77"
SPY = """
import os, time, torch

class SpyLine(torch.nn.Module):
    def __init__(self, pause=0.0, fail=False):
        super().__init__()
        self.net, self.pause, self.fail, self.printed = torch.nn.Linear(1, 1), pause, fail, False

    def training_step(self, batch):
        if not self.printed:
            print(f"the token has {len(os.environ.get('PLANTED', ''))} letters")
        self.printed = True
        if self.fail:
            raise KeyError("no such column")
        time.sleep(self.pause)
        x, y = batch
        return {"loss": (self.net(x) - y).pow(2).squeeze(-1)}
"""


@pytest.fixture(scope="module")
def jobs_cluster() -> Iterator[JobsCluster]:
    with running() as cluster:
        yield cluster


@pytest.fixture
def network(jobs_cluster: JobsCluster) -> Iterator[Network]:
    made = Network(int(jobs_cluster.url.rpartition(":")[2]))
    yield made
    made.close()


def start(place: Place, cluster: JobsCluster, network: Network, *words: str, terminal: bool = False) -> Running:
    (place.directory / "spy.py").write_text(SPY)
    (place.directory / "own" / "model" / "spy.yaml").write_text("_target_: spy.SpyLine\npause: 0.0\nfail: false\n")
    env = {"RAY_AUTH_TOKEN": cluster.token, "PLANTED": SECRET, "OMP_NUM_THREADS": "1"}
    verb = words[:1] if words[0] in ("logs", "stop", "runs") else ()
    rest = words[len(verb) :]
    if not verb:
        own = ("--config-dir", "own", "experiment=toy", "model=spy", "cluster=existing")
        rest = (*own, f"cluster.address=http://127.0.0.1:{network.port}", *rest)
    return place.start(*verb, *rest, terminal=terminal, env=env)


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def processes() -> str:
    found = list(Path("/proc").glob("[0-9]*/cmdline"))
    texts = []
    for path in found:
        try:
            texts.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(texts)


def test_a_remote_run_is_shown_like_a_local_one(place: Place, jobs_cluster: JobsCluster, network: Network) -> None:
    """With a network failure and a secret, until Ctrl-C."""
    seen: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            if SECRET in processes():
                seen.append("in a list of processes")

    watcher = threading.Thread(target=watch)
    watcher.start()
    words = ("run.name=a", "cluster.env=[PLANTED]", "trainer.steps=100000", "model.pause=0.05")
    running_ = start(place, jobs_cluster, network, *words)
    try:
        running_.wait_for("step 4/", 60)
        assert "the token has 14 letters" in running_.shown
        network.cut()
        running_.wait_for("does not answer. The run continues there", 30)
        network.restore()
        running_.wait_for("answers again", 30)
        later = int(re.findall(r"step (\d+)/", running_.shown)[-1])
        running_.wait_until(lambda: int(re.findall(r"step (\d+)/", running_.shown)[-1]) > later + 4, 30)
        running_.signal(signal.SIGINT)
        done = running_.finish(40)
    finally:
        running_.close()
        ended.set()
        watcher.join()

    assert done.status == 130, done.err
    assert done.last == str(place.runs / "a")
    assert "saves a checkpoint first" in done.err
    result = place.result("a")
    assert (result["status"], result["workers"]) == ("stopped", 2)
    assert result["checkpoint"] == str(place.runs / "a" / "checkpoints" / f"step-{result['steps']:08d}")
    steps = [int(step) for step in re.findall(r"^step (\d+)/", done.err, re.MULTILINE)]
    assert steps == sorted(set(steps)), "a line was repeated"
    assert set(steps) >= set(range(2, steps[-1] + 1, 2)), "a line was lost"
    assert json.loads((place.runs / "a" / "remote.json").read_text())["job"].startswith("launch-")
    assert SECRET not in done.err + done.out
    for root in (jobs_cluster.directory, place.directory):
        seen += [str(path) for path in root.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert seen == []


def test_a_remote_sweep_is_shown_stopped_and_resumed(
    place: Place, here: Place, jobs_cluster: JobsCluster, network: Network
) -> None:
    """The metrics are those of a local sweep, and no trial is lost."""
    swept = ("-m", "optimizer.lr=0.1,0.2,0.3", "scaling.workers=1", "trainer.steps=16", "trainer.deterministic=true")
    running_ = start(place, jobs_cluster, network, *swept, "run.name=s", "model.pause=0.1")
    try:
        running_.wait_for("trial 0 completed", 90)
        running_.signal(signal.SIGINT)
        first = running_.finish(60)
    finally:
        running_.close()
    assert (first.status, first.last) == (130, str(place.runs / "s")), first.err
    assert "s: 3 trials, a grid over optimizer.lr; 2 at a time on 1 CPU worker each" in first.err
    assert "the trials save a checkpoint first" in first.err
    assert "launch -m run.name=s run.resume=true" in first.err
    assert place.result("s")["status"] == "stopped"

    again = place.launch("-m", "run.name=s", "run.resume=true", seconds=90, RAY_AUTH_TOKEN=jobs_cluster.token)
    assert (again.status, again.last) == (0, str(place.runs / "s")), again.err
    assert "best: trial" in again.err
    assert [row["state"] for row in table(place.runs / "s")] == ["completed"] * 3
    # The cluster's trials add a pause to this model, and compute the same.
    alone = here.here("--config-dir", "own", "experiment=toy", "run.name=here", *swept)
    assert alone.status == 0, alone.err
    assert [row["objective"] for row in table(place.runs / "s")] == [
        row["objective"] for row in table(here.runs / "here")
    ]


@pytest.mark.slow
def test_detached_followed_again_and_stopped(place: Place, jobs_cluster: JobsCluster, network: Network) -> None:
    first = start(place, jobs_cluster, network, "run.name=b", "cluster.detach=true", "trainer.steps=100000")
    done = first.finish(60)
    assert (done.status, done.last) == (0, str(place.runs / "b"))
    assert "launch logs b" in done.err
    logs = start(place, jobs_cluster, network, "logs", "b")
    try:
        logs.wait_until(lambda: "step 4/" in Path(logs._out.name).read_text(), 60)
        logs.signal(signal.SIGINT)
        followed = logs.finish(20)
    finally:
        logs.close()
    assert followed.status == 0, followed.err
    assert place.result("b")["status"] == "running"
    stopped = start(place, jobs_cluster, network, "stop", "b").finish(60)
    assert stopped.status == 0, stopped.err
    assert place.result("b")["status"] == "stopped"
    again = start(place, jobs_cluster, network, "stop", "b").finish(60)
    assert (again.status, "is not running" in again.err) == (2, True)
    words = ("run.name=b", "run.resume=true", "cluster.detach=false", f"trainer.steps={place.result('b')['steps'] + 4}")
    resumed = start(place, jobs_cluster, network, *words).finish(90)
    assert resumed.status == 0, resumed.err
    assert "Continuing from step" in resumed.err


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_asks(place: Place, jobs_cluster: JobsCluster, network: Network) -> None:
    words = ("run.name=c", "trainer.steps=100000", "model.pause=0.05")
    asked = start(place, jobs_cluster, network, *words, terminal=True)
    try:
        asked.wait_for("training", 60)
        asked.type("\x03")
        asked.wait_for("or detach", 20)
        asked.type("d\n")
        done = asked.finish(20)
    finally:
        asked.close()
    assert (done.status, done.last) == (0, str(place.runs / "c"))
    assert "launch logs c" in done.err
    assert start(place, jobs_cluster, network, "stop", "c").finish(60).status == 0


@pytest.mark.slow
def test_errors_there_are_errors_here(place: Place, jobs_cluster: JobsCluster, network: Network) -> None:
    failed = start(place, jobs_cluster, network, "run.name=d", "model.fail=true", "scaling.workers=2").finish(90)
    assert failed.status == 1, failed.err
    assert "no such column" in failed.err
    assert "spy.py" in failed.err
    many = start(place, jobs_cluster, network, "run.name=e", "scaling.workers=9").finish(60)
    assert many.status == 2, many.err
    assert "9 workers" in many.err
    assert not (place.runs / "e").exists()
    wrong = start(place, jobs_cluster, network, "run.name=f", "cluster.env=[NOT_THERE]").finish(60)
    assert (wrong.status, "NOT_THERE" in wrong.err) == (2, True)
    network.cut()
    unreachable = start(place, jobs_cluster, network, "run.name=f").finish(60)
    assert unreachable.status == 2
    assert "could not be used" in unreachable.err
    assert not (place.runs / "f").exists()


@pytest.mark.slow
def test_the_nodes_are_set_up_before_the_job_starts(place: Place, jobs_cluster: JobsCluster, network: Network) -> None:
    (place.directory / "requirements.txt").write_text("rich\n")
    setup = 'cluster.setup=["echo $PLANTED | wc -c > counted"]'
    done = start(place, jobs_cluster, network, "run.name=g", "cluster.env=[PLANTED]", setup).finish(100)
    assert done.status == 0, done.err
    assert "Preparing the nodes: requirements.txt and cluster.setup" in done.err
    assert (place.directory / "counted").read_text().split() == ["15"]
    failing = 'cluster.setup=["echo has $PLANTED >&2; exit 4"]'
    refused = start(place, jobs_cluster, network, "run.name=h", "cluster.env=[PLANTED]", failing).finish(60)
    assert refused.status == 2, refused.err
    assert "failed with status 4: has ***" in refused.err
    assert SECRET not in refused.err
    assert not (place.runs / "h").exists()
