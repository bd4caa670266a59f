"""A Slurm on this machine: a controller and nodes as processes, which listen on free ports and keep their files apart.

Authentication is off (`auth/none`), so this Slurm is for tests alone. It needs root and Debian's package slurm-wlm.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.waiting import wait_for

_CONFIGURATION = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ReturnToService=2
SlurmdTimeout=300
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


class SlurmLab:
    """A controller and two nodes with two CPUs each, as long as the `with` block runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmLab:
        (self.directory / "state").mkdir(parents=True)
        content = _CONFIGURATION.format(host=socket.gethostname(), ports=_free_ports(3), directory=self.directory)
        (self.directory / "slurm.conf").write_text(content)
        try:
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D", "-N", "n1")
            self._start("slurmd", "-D", "-N", "n2")
            wait_for(lambda: self.ask("sinfo", "--noheader", "--Node", "--format=%T") == "idle\nidle\n", 60, self._log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in ("scancel", "--full"), ("scancel", "--state=PENDING"):
            self.ask(*name, "--user=root")
        wait_for(lambda: not self.ask("squeue", "--noheader"), 60, "jobs are left")
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *words: str) -> str:
        """Run a program of Slurm, and return its output."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout

    def marked(self) -> list[str]:
        """Return the processes that tasks of jobs have started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in entries and any(
                entry.startswith(b"LAUNCH_SLURM=") for entry in entries
            ):
                found.append(path.parent.name)
        return found

    def _start(self, program: str, *words: str) -> None:
        output = (self.directory / f"{program}.out").open("ab")
        command = [program, *words, "-f", self.environment["SLURM_CONF"]]
        with output:
            process = subprocess.Popen(command, env={**os.environ, **self.environment}, stdout=output, stderr=output)
        self._processes.append(process)

    def _log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.directory.glob("*.log")))


def why_not() -> str | None:
    """Return why this machine cannot have a Slurm of its own; None if it can."""
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        return f"{', '.join(missing)} not found; on Debian: apt-get install slurm-wlm"
    return None if os.geteuid() == 0 else "slurmd needs root"


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    if problem := why_not():
        pytest.skip(problem)
    with SlurmLab(tmp_path_factory.mktemp("slurm") / "lab") as made:
        yield made
