"""The table of faults, with the expected result of each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.engine.checkpoint import available
from tests.faults.harness import EVERY, SAVING, Outcome, Trial, failed_in_order, judge
from tests.support.scheduled_events import event
from tests.support.vmlab.lab import Host, Lab

UNANNOUNCED = EVERY + SAVING - 1  # lost_steps < checkpoint.every + the steps of one save
DAMAGED = UNANNOUNCED + EVERY  # the newest checkpoint is damaged, and the one before it is used
ANNOUNCED = 1
ELASTIC = ("scaling.min_workers=1",)


@dataclass(frozen=True)
class Row:
    """One fault. `place`: none (in this process), local (two workers here), machines (two, with a node of Ray each).

    alike: it is compared with an undisturbed run of the same words, and not with the one that all others share.
    """

    fault: str
    place: str
    play: Callable[[Trial], tuple[int, str]]
    most_lost: int = UNANNOUNCED
    words: tuple[str, ...] = ()
    core: bool = False
    nodes: int = 2
    alike: bool = False

    @property
    def id(self) -> str:
        return self.fault.replace(" ", "-").replace(",", "")


def play(row: Row, directory: Path, lab: Lab | None, reference: Trial) -> Outcome:
    """Run a row and return its outcome. Raises AssertionError if it is not the expected one."""
    words = [*row.words, *(("cluster=none", "model.seconds=0.05") if row.place == "none" else ())]
    if row.place == "local":
        words += ["cluster=local", "scaling.workers=2"]
    if lab is not None:
        lab.restore(row.nodes)
    if row.alike:
        reference = undisturbed(directory / "reference", *words)
    trial = Trial(directory, lab if row.place == "machines" else None, *words)
    try:
        status, how = row.play(trial)
        return judge(trial, row.fault, status, reference, row.most_lost, how)
    finally:
        trial.close()


def undisturbed(directory: Path, *words: str) -> Trial:
    """Run the job without a fault, and return it."""
    directory.mkdir(exist_ok=True)
    trial = Trial(directory, None, *words)
    trial.start()
    assert trial.finish() == 0, trial.output()
    return trial


# ---- on one machine -------------------------------------------------------------------------------------------------


def worker_killed(rank: int) -> Callable[[Trial], tuple[int, str]]:
    def fault(trial: Trial) -> tuple[int, str]:
        trial.start()
        trial.wait_for_step(10)
        trial.strike(trial.worker(rank))
        return trial.finish(), "completed"

    return fault


def worker_halted(trial: Trial) -> tuple[int, str]:
    trial.start()
    trial.wait_for_step(10)
    trial.strike(trial.worker(1), signal.SIGSTOP)
    return trial.finish(), "completed"


def killed_twice(trial: Trial) -> tuple[int, str]:
    trial.start()
    trial.wait_for_step(6)
    trial.strike(trial.worker(1))
    trial.wait_for_step(12, attempt=2)
    trial.strike(trial.worker(0))
    return trial.finish(), "completed"


def controller_killed(trial: Trial) -> tuple[int, str]:
    trial.start()
    trial.wait_for_step(10)
    assert trial.process is not None
    trial.strike(below(trial.process.pid, "TrainController"))
    status = trial.finish()
    if status == 0:
        return status, "completed"
    failed_in_order(trial, status, "controller")
    return resumed(trial), "failed with a reason, completed by run.resume=true"


def driver_killed(trial: Trial) -> tuple[int, str]:
    kill_driver(trial)
    return resumed(trial), "completed by run.resume=true"


def damaged(damage: Callable[[Path], None]) -> Callable[[Trial], tuple[int, str]]:
    """The driver is killed, and the newest checkpoint is damaged."""

    def fault(trial: Trial) -> tuple[int, str]:
        kill_driver(trial)
        found = available(trial.checkpoints)
        damage(found[max(found)])
        return resumed(trial), "completed by run.resume=true from the checkpoint before"

    return fault


def truncate(checkpoint: Path) -> None:
    path = largest(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    path = largest(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_metadata(checkpoint: Path) -> None:
    (checkpoint / "metadata.json").unlink()


def disk_full(trial: Trial) -> tuple[int, str]:
    with small_disk(trial.root) as fill:
        trial.start()
        trial.wait_for_checkpoint(8)
        trial.struck = time.time()
        ballast = fill()
        status = trial.finish()
        how = "completed"
        if status != 0:
            failed_in_order(trial, status, "space")
            ballast.unlink()
            status, how = resumed(trial), "failed with a reason, completed by run.resume=true"
        shutil.copytree(trial.root, trial.directory / "kept")  # it is checked after this disk was unmounted
        trial.root = trial.directory / "kept"
        return status, how


def kill_driver(trial: Trial) -> None:
    trial.start()
    trial.wait_for_checkpoint(8)
    trial.wait_for_step(10)
    assert trial.process is not None
    trial.strike(trial.process.pid)
    trial.process.wait(240)
    workers = trial.attempts()[-1].workers.values()
    latest = time.monotonic() + 240
    while any(Path(f"/proc/{worker['pid']}").exists() for worker in workers):
        assert time.monotonic() < latest, "workers outlive their driver"
        time.sleep(0.1)


def resumed(trial: Trial) -> int:
    trial.start("run.resume=true")
    return trial.finish()


def largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.bin"), key=lambda path: path.stat().st_size)


def below(pid: int, title: str) -> int:
    """Return the process with this title in the Ray of a driver, which is found by its marker."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if title.encode() in (path / "cmdline").read_bytes() and ancestor(int(path.name), pid):
                return int(path.name)
    raise AssertionError(f"no process {title}")


def ancestor(pid: int, wanted: int) -> bool:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if pid == wanted:
            return True
    return False


# ---- on several machines --------------------------------------------------------------------------------------------


def machines_of(trial: Trial) -> Lab:
    assert trial.lab is not None
    return trial.lab


def trains_on(trial: Trial, host: str) -> bool:
    return any(worker["host"] == host for worker in trial.attempts()[-1].workers.values())


def node_killed(trial: Trial) -> tuple[int, str]:
    trial.start()
    trial.wait_for_step(10)
    trial.struck = time.time()
    [host] = [one for one in machines_of(trial).hosts[1:] if trains_on(trial, one.name)][:1]
    host.kill()
    return trial.finish(), "completed"


def raylet_killed(trial: Trial) -> tuple[int, str]:
    trial.start()
    trial.wait_for_step(10)
    [raylet] = machines_of(trial).hosts[1].find("raylet/raylet ")
    trial.strike(raylet)
    return trial.finish(), "completed"


def link_cut(seconds: float | None) -> Callable[[Trial], tuple[int, str]]:
    def fault(trial: Trial) -> tuple[int, str]:
        host = machines_of(trial).hosts[1]
        trial.start()
        trial.wait_for_step(10)
        trial.struck = time.time()
        host.cut()
        if seconds is not None:
            time.sleep(seconds)
            host.restore_link()
        return trial.finish(), "completed"

    return fault


def drained(seconds: float) -> Callable[[Trial], tuple[int, str]]:
    """Ray drains the node of a machine; then the machine is killed."""

    def fault(trial: Trial) -> tuple[int, str]:
        trial.start(*unhurried(seconds))
        trial.wait_for_step(6)
        host = next(one for one in machines_of(trial).hosts[1:] if trains_on(trial, one.name))
        trial.struck, trial.announced = time.time(), True
        host.drain(seconds)
        return left_in_time(trial, host, trial.struck + seconds)

    return fault


def noticed(seconds: float, withdrawn: bool = False) -> Callable[[Trial], tuple[int, str]]:
    """The metadata service of Azure announces the eviction to the agent on the machine."""

    def fault(trial: Trial) -> tuple[int, str]:
        lab = machines_of(trial)
        host = lab.hosts[1]
        events = trial.directory / "events.json"
        events.write_text("[]")
        python = [sys.executable, "-m"]
        host.start([*python, "tests.support.scheduled_events", host.name, "8111", str(events)])
        metadata = ["--metadata", "http://127.0.0.1:8111"]
        agent = host.start([*python, "launcher.clusters.eviction", "--address", lab.address, *metadata], log="agent")
        trial.start(*unhurried(seconds))
        trial.wait_for_step(6)
        trial.struck, trial.announced = time.time(), True
        deadline = float(round(trial.struck + seconds))  # Azure's have no fractions
        events.write_text(json.dumps([event(host.name, not_before=deadline)]))
        if not withdrawn:
            return left_in_time(trial, host, deadline)
        time.sleep(3)
        events.write_text("[]")
        status = trial.finish()
        assert agent.poll() is None, host.log("agent")
        assert trial.result()["preemptions"] == 0
        assert "was withdrawn" in trial.output()
        return status, "completed, nothing was done"

    return fault


def unhurried(seconds: float) -> list[str]:
    """Return overrides with which the run takes longer than `seconds`."""
    return [f"model.seconds={max(0.3, seconds / 25):g}"]


def left_in_time(trial: Trial, host: Host, deadline: float) -> tuple[int, str]:
    """Kill the machine at its deadline. The run must have left it without a failure."""
    time.sleep(max(0.0, deadline - time.time()))
    host.kill()
    status = trial.finish()
    result = trial.result()
    assert (result["preemptions"], result["restarts"]) == (1, 0), f"{result}\n{trial.output()}"
    assert not trains_on(trial, host.name)
    return status, "completed"


def node_joins(trial: Trial) -> tuple[int, str]:
    trial.start("model.seconds=1")  # so that there is something left to do
    trial.wait_for_step(4)
    trial.struck, trial.announced = time.time(), True
    machines_of(trial).hosts[1].start_ray()
    status = trial.finish()
    sizes = trial.result()["world_sizes"]
    assert sizes == [1, 2], f"world sizes {sizes}:\n{trial.output()}"
    return status, "completed"


def joins_and_is_cut(trial: Trial) -> tuple[int, str]:
    """Ray treats the machine as alive for a minute, with free resources for a worker."""
    trial.start("model.seconds=0.5")
    trial.wait_for_step(2)
    lab = machines_of(trial)
    lab.hosts[1].start_ray()
    lab.wait_for_nodes(2)
    lab.hosts[1].cut()
    return trial.finish(), "completed"


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int = 16) -> Iterator[Callable[[], Path]]:
    """Mount a separate disk at a directory, and yield a function that fills it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True)

    def fill() -> Path:
        ballast = place / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))
        return ballast

    try:
        yield fill
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


ROWS = (
    Row("newest checkpoint truncated", "none", damaged(truncate), DAMAGED),
    Row("newest checkpoint with one byte flipped", "none", damaged(flip), DAMAGED, core=True),
    Row("newest checkpoint without its metadata", "none", damaged(without_metadata), DAMAGED),
    Row("disk full while saving", "none", disk_full),
    Row("driver killed", "local", driver_killed),
    Row("worker killed", "local", worker_killed(1)),
    Row(
        "worker killed, without deterministic mode",
        "local",
        worker_killed(1),
        words=("trainer.deterministic=false",),
        alike=True,
    ),
    Row("rank 0 killed", "local", worker_killed(0)),
    Row("worker halted (SIGSTOP)", "local", worker_halted, words=("scaling.timeout=6",)),
    Row("two faults in a row", "local", killed_twice, 2 * UNANNOUNCED, core=True),
    Row("controller killed", "local", controller_killed),
    Row("node lost, another one is there", "machines", node_killed, core=True, nodes=3),
    Row("node lost, fewer workers continue", "machines", node_killed, words=ELASTIC),
    Row("raylet of a node killed", "machines", raylet_killed, words=ELASTIC),
    Row("link of a machine cut for 20 s", "machines", link_cut(20), words=ELASTIC),
    Row("link of a machine cut for good", "machines", link_cut(None), words=ELASTIC),
    Row("eviction notice of 30 s", "machines", noticed(30), ANNOUNCED, words=ELASTIC),
    Row("eviction notice of 3 s", "machines", noticed(3), ANNOUNCED, words=ELASTIC, core=True),
    Row("eviction notice withdrawn", "machines", noticed(30, withdrawn=True), 0, words=ELASTIC),
    Row("node drained by Ray with 30 s notice", "machines", drained(30), ANNOUNCED, words=ELASTIC),
    Row("node drained by Ray with 3 s notice", "machines", drained(3), ANNOUNCED, words=ELASTIC),
    Row("node drained by Ray, another one is there", "machines", drained(8), ANNOUNCED, nodes=3),
    Row("node joins in the middle of an epoch", "machines", node_joins, ANNOUNCED, words=ELASTIC, nodes=1),
    Row("node joins, and its link is cut for good", "machines", joins_and_is_cut, ANNOUNCED, words=ELASTIC, nodes=1),
)
