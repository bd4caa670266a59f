"""The task of a Slurm job on each node: a node of Ray, and on the first one the driver of the run.

    srun python -m launcher.clusters.slurm.node FOLDER RUN [--requeue] -- train WORDS…

The tasks find each other through files in FOLDER/<job>.<restart>, on the file system that the nodes share:

    token          of this Ray cluster, readable by this user alone
    head.json      address of the head, written when it accepts connections
    node-N.json    written when task N has joined, or with the reason why it could not
    ended          written when the driver has exited: the others leave
    left-N         written when task N has left
    status.json    exit status of the run, unless the job is queued again

All ports are free ones chosen at the start, so several jobs fit on a host. SIGUSR1 (`sbatch --signal`) announces the
time limit: the run saves a checkpoint and stops, and with --requeue the job is queued again. SIGUSR2 stops the run as
Ctrl-C does, SIGTERM as SIGTERM does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.clusters import reaper
from launcher.clusters.base import attached
from launcher.clusters.remote.on_host import STARTED, interface_of
from launcher.clusters.slurm.kind import SlurmCluster
from launcher.clusters.slurm.script import EXIT, REQUEUE
from launcher.clusters.slurm.submission import STATUS
from launcher.errors import RunError
from launcher.ray_seam import settings
from launcher.runs import RunDirectory, store_copies, user_state

MARK = "LAUNCH_SLURM"
_NOTICE, _INTERRUPT = signal.SIGUSR1, signal.SIGUSR2
# What the driver receives for a signal of the task.
_TO_DRIVER = {_NOTICE: signal.SIGTERM, _INTERRUPT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM}
_START_SECONDS, _JOIN_SECONDS, _LEAVE_SECONDS = 120.0, 600.0, 30.0
_ATTEMPTS = 3  # a port may be taken between the choice and its use
_OBJECT_STORE_SHARE = 0.3  # of the memory of the job on a node, as Ray's default
_SMALLEST_STORE = 100 * 2**20  # Ray accepts no smaller one than 75 MiB
# Variables with which srun describes a task. Ray's workers are not the tasks: they must not take part as such.
_OF_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_GTIDS", "SLURM_TASK_PID", "SLURM_STEP")


class TaskFailed(Exception):
    """A node of the job cannot take part. The message is a sentence."""


class TaskStopped(Exception):
    """A signal has arrived, or the first task has ended, before the cluster was complete."""


@dataclass
class NodeTask:
    """One task of the job.

    Attributes:
        shared: the directory for this start of the job, which all nodes see.
        number, count: the number of this task, and of all tasks.
        restarts: how often the job was queued again.
        received: the signals that arrived, the first of each kind.
    """

    shared: Path
    number: int
    count: int
    restarts: int
    received: list[signal.Signals] = field(default_factory=list)

    @classmethod
    def of_environment(cls, folder: Path) -> NodeTask:
        env = os.environ
        restarts = int(env.get("SLURM_RESTART_COUNT") or 0)
        count = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
        return cls(folder / f"{env['SLURM_JOB_ID']}.{restarts}", int(env.get("SLURM_PROCID") or 0), count, restarts)

    @property
    def state(self) -> Path:
        """The state directory ($XDG_STATE_HOME) of the driver, in all starts of the job."""
        return self.shared.parent / "state"

    def take(self, number: int, _frame: FrameType | None) -> None:
        if number not in self.received:
            self.received.append(signal.Signals(number))

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a file so that other nodes see it as a whole."""
        temporary = self.shared / f".{name}.{self.number}"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(content, file)
        temporary.replace(self.shared / name)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the content of a file; None if it does not exist. Opening it refreshes what NFS has cached."""
        try:
            content: dict[str, Any] = json.loads((self.shared / name).read_text())
        except (OSError, ValueError):
            return None
        return content

    def wait_for(self, name: str, who: str) -> dict[str, Any]:
        """Wait for a file of another task, and return its content.

        Raises:
            TaskFailed: the other task failed, or did not write it in time.
            TaskStopped: a signal has arrived, or the first task has ended.
        """
        latest = time.monotonic() + _JOIN_SECONDS
        while (found := self.read(name)) is None:
            if self.received or self.read("ended") is not None:
                raise TaskStopped
            if time.monotonic() > latest:
                raise TaskFailed(f"{who} did not start within {_JOIN_SECONDS:.0f} s")
            time.sleep(0.2)
        if "failed" in found:
            raise TaskFailed(str(found["failed"]))
        return found


# ---- Ray ------------------------------------------------------------------------------------------------------------


def free_ports(number: int) -> list[int]:
    """Return ports of this host on which no process listens, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def own_address(head: str | None) -> str:
    """Return the address of this node in the network of the cluster.

    Args:
        head: the address of the head; None on the head itself, where Slurm names the address of the node.
    """
    if head is None and (given := os.environ.get("SLURM_LAUNCH_NODE_IPADDR")):
        return given
    if head is None:
        return socket.gethostbyname(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # nothing is sent
        return str(probe.getsockname()[0])


def resources() -> list[str]:
    """Return the options of `ray start` for what Slurm has assigned to the job on this node."""
    options = []
    if (cpus := os.environ.get("SLURM_CPUS_ON_NODE", "")).isdigit():
        options.append(f"--num-cpus={cpus}")
    if (memory := os.environ.get("SLURM_MEM_PER_NODE", "")).isdigit() and int(memory):
        options.append(f"--object-store-memory={max(int(int(memory) * 2**20 * _OBJECT_STORE_SHARE), _SMALLEST_STORE)}")
    return options


def environment(task: NodeTask, address: str, scratch: Path) -> dict[str, str]:
    """Return the environment of Ray, its workers and the driver."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_TASK)}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        env.pop(name, None)
    if (interface := interface_of(address)) is not None:  # the name of a host may resolve to a loopback address
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
        env.setdefault("NCCL_SOCKET_IFNAME", interface)
    return env | {
        **settings.RAY_ENVIRONMENT,
        "RAY_AUTH_TOKEN_PATH": str(task.shared / "token"),
        "RAY_TMPDIR": f"{scratch}/r",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
        MARK: f"{task.shared.name}.{task.number}",
    }


@contextlib.contextmanager
def ray_node(task: NodeTask, head: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Run a node of Ray during the block, and end all its processes afterwards.

    Args:
        head: the content of head.json; None on the head.

    Yields:
        address, port, scratch (the directory for Ray's files, the same path on all nodes), env and process.

    Raises:
        TaskFailed: Ray does not start.
        TaskStopped: a signal has arrived.
    """
    address = own_address(None if head is None else head["address"])
    scratch = Path(f"{_short_temporary()}/launch-{secrets.token_hex(4)}" if head is None else head["scratch"])
    with contextlib.suppress(FileExistsError):  # two nodes of a job may be one host
        scratch.mkdir(mode=0o700, parents=True)
    if scratch.lstat().st_uid != os.getuid() or scratch.is_symlink():
        raise TaskFailed(f"{scratch} is not a directory of this user")
    env = environment(task, address, scratch)
    log = scratch / f"ray-{task.number}.log"
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            port = free_ports(1)[0] if head is None else int(head["port"])
            process = _start(_arguments(address, port, head, scratch), env, log)
            try:
                _await_start(task, process, log)
                break
            except TaskFailed:
                reaper.end(f"{MARK}={env[MARK]}", grace=0.5)
                if attempt == _ATTEMPTS:
                    raise
        yield {"address": address, "port": port, "scratch": str(scratch), "env": env, "process": process}
    finally:
        reaper.end(f"{MARK}={env[MARK]}", grace=2.0)
        shutil.rmtree(scratch, ignore_errors=True)


def _arguments(address: str, port: int, head: dict[str, Any] | None, scratch: Path) -> list[str]:
    agent, grpc, dashboard, client = free_ports(4)
    words = [f"--node-ip-address={address}", f"--dashboard-agent-listen-port={agent}"]
    words += [
        f"--dashboard-agent-grpc-port={grpc}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
        "--block",
        *resources(),
    ]
    if head is not None:
        return [f"--address={head['address']}:{port}", *words]
    words += ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--no-monitor"]
    if importlib.util.find_spec("grpc") is not None:
        words.append(f"--ray-client-server-port={client}")
    return [*words, f"--temp-dir={scratch}/r"]


def _start(words: Sequence[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, *settings.COMMAND, "start", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            preexec_fn=_ignore_signals,
        )


def _ignore_signals() -> None:
    """Ignore the signals that Slurm may send to all processes of the job and that only this task acts on."""
    for number in (_NOTICE, _INTERRUPT):
        signal.signal(number, signal.SIG_IGN)


def _await_start(task: NodeTask, process: subprocess.Popen[bytes], log: Path) -> None:
    latest = time.monotonic() + _START_SECONDS
    while STARTED not in log.read_text(errors="replace"):
        if task.received:
            raise TaskStopped
        if process.poll() is not None or time.monotonic() > latest:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise TaskFailed(
                f"Ray does not start on {socket.gethostname()}: {' '.join(lines[-6:])[-700:] or 'no output'}"
            )
        time.sleep(0.05)


def _short_temporary() -> str:
    """Return the root for Ray's files: the path of a Unix socket has at most 107 characters."""
    root = tempfile.gettempdir()
    return root if len(root) <= 16 else "/tmp"


# ---- the tasks ------------------------------------------------------------------------------------------------------


def run_head(task: NodeTask, run: str, command: Sequence[str], requeue: bool) -> int | str:
    """Run the head and the driver. Returns the exit status of the run, or REQUEUE if it is to continue later.

    Args:
        run: the run directory, a path or a URI.
        command: the arguments of `launch`, without those about the cluster.
    """
    status = 1
    task.shared.mkdir(mode=0o700, parents=True, exist_ok=True)
    (task.shared / "ended").unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(task.shared / "token", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with ray_node(task, None) as ray:
            task.write("head.json", {name: ray[name] for name in ("address", "port", "scratch")})
            for number in range(1, task.count):
                task.wait_for(f"node-{number}.json", f"Task {number}")
            address = f"{ray['address']}:{ray['port']}"
            _record_cluster(task, run, address)
            status = _drive(task, _driver(task, command, address), ray["env"])
            task.write("ended", {})
    except TaskStopped:
        status = 128 + _TO_DRIVER[task.received[0]]
    except (TaskFailed, RunError, OSError) as problem:
        print(
            f"The Ray cluster of the Slurm job could not be started: {str(problem).rstrip('.')}.",
            file=sys.stderr,
            flush=True,
        )
    finally:
        task.write("ended", {})
        (task.shared / "token").unlink(missing_ok=True)
    latest = time.monotonic() + _LEAVE_SECONDS
    while time.monotonic() < latest and any(task.read(f"left-{each}") is None for each in range(1, task.count)):
        time.sleep(0.1)
    stopped = bool(task.received) and status == 128 + signal.SIGTERM
    if stopped and requeue and task.received[0] == _NOTICE:
        print("The time limit of the Slurm job is near: it is queued again, and the run continues.", file=sys.stderr)
        return REQUEUE
    task.write(STATUS, {"exit": status})
    return status


def run_member(task: NodeTask) -> None:
    """Run a node of Ray until the first task ends. A Ray that exits before is started again."""
    try:
        head = task.wait_for("head.json", "The first task")
        while task.read("ended") is None:
            with ray_node(task, head) as ray:
                task.write(f"node-{task.number}.json", {"address": ray["address"]})
                # SIGTERM goes to all tasks, but the driver needs the workers until it has saved.
                while task.read("ended") is None and ray["process"].poll() is None:
                    time.sleep(0.5)
    except TaskStopped:
        pass
    except (TaskFailed, OSError) as problem:
        task.write(f"node-{task.number}.json", {"failed": str(problem)})
    task.write(f"left-{task.number}", {})


def _driver(task: NodeTask, command: Sequence[str], address: str) -> list[str]:
    """Return the command of the driver. After a restart of the job it continues the run."""
    words = list(command)
    if task.restarts:
        words = [*(word for word in words if not word.startswith("run.resume=")), "run.resume=auto"]
    return [sys.executable, "-P", "-m", "launcher", *words, "cluster=existing", f"cluster.address={address}"]


def _record_cluster(task: NodeTask, run: str, address: str) -> None:
    """Record the Ray cluster as that of the run, since a run that is continued keeps the cluster of its user's record.

    The record is the job's own: on the login node the address has no meaning.
    """
    os.environ["XDG_STATE_HOME"] = str(task.state)
    root, _, name = run.rpartition("/")
    place = store_copies.copy_below(store_copies.bases()[0], root) if "://" in root else Path(root)
    user_state.save(RunDirectory(place / name), cluster=asdict(attached(SlurmCluster(), address)))


def _drive(task: NodeTask, words: Sequence[str], env: dict[str, str]) -> int:
    """Run the driver, forward the first signal to it, and return its exit status."""
    driver = subprocess.Popen(
        words,
        env=env | {"XDG_STATE_HOME": str(task.state)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # the path of the run, which the command on the login node has printed
        start_new_session=True,
        preexec_fn=_ignore_signals,
    )
    forwarded = False
    while driver.poll() is None:
        if task.received and not forwarded:
            driver.send_signal(_TO_DRIVER[task.received[0]])
            forwarded = True
        time.sleep(0.1)
    return driver.returncode if driver.returncode >= 0 else 128 - driver.returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the task of this process."""
    parser = argparse.ArgumentParser(prog="python -m launcher.clusters.slurm.node")
    parser.add_argument("folder", type=Path)
    parser.add_argument("run")
    parser.add_argument("--requeue", action="store_true")
    given = list(sys.argv[1:] if arguments is None else arguments)
    split = given.index("--")
    options, command = parser.parse_args(given[:split]), given[split + 1 :]
    os.umask(0o077)
    task = NodeTask.of_environment(options.folder)
    for number in _TO_DRIVER:
        signal.signal(number, task.take)
    if task.number:
        run_member(task)
    else:
        (options.folder / EXIT).write_text(f"{run_head(task, options.run, command, options.requeue)}\n")


if __name__ == "__main__":
    main()
