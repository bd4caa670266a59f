"""`cluster=ssh`: validation of the keys, commands on a host, `up` and `down`, and errors of hosts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.remote import bootstrap, on_host, project, registry
from launcher.clusters.remote.bootstrap import Environment
from launcher.clusters.remote.shell import Shell
from launcher.clusters.ssh import lifecycle as ssh
from launcher.clusters.ssh.kind import SshCluster
from launcher.errors import ClusterError, ConfigError, HostError, MachineError
from tests.support import servers
from tests.support.command import Place

pytestmark = pytest.mark.skipif(bool(servers.why_no_ssh()), reason=servers.why_no_ssh() or "-")
PLACE: dict[str, Any] = {"base": "~/.launch", "cluster": "pair"}


@pytest.fixture(autouse=True)
def own_directories(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.server(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def shell(server: servers.Server) -> Iterator[Shell]:
    made = Shell(server.words)
    yield made
    made.close()


def config(server: servers.Server, *hosts: str, **keys: str) -> SshCluster:
    return SshCluster(hosts=list(hosts), ssh_config=str(server.config), **keys)  # type: ignore[arg-type]


def test_what_is_sent_of_a_project(tmp_path: Path) -> None:
    """Runs are not sent; a package with the name `runs` is."""
    for name in ("train.py", "runs/a/result.json", "src/runs/table.py", ".venv/bin/python", "src/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert project.select(tmp_path).files == ["src/runs/table.py", "train.py"]
    assert "launcher/runs/__init__.py" in project.own_files()


# ---- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster=ssh", "cluster.hosts=[a,a]"], r"^launch: cluster\.hosts \w+ a "),
        (["cluster=ssh", "cluster.hosts=['a b']"], r"'a b'.*\[USER@\]HOST\[:PORT\]"),
        (["cluster=ssh", "cluster.hosts=['-oProxyCommand=true']"], r"'-oProxyCommand=true'.*\[USER@\]HOST\[:PORT\]"),
        (["cluster=ssh", "cluster.hosts=[[fd00::1]]"], r"\['fd00::1'\]"),
        (["cluster=local", "cluster.hosts=[a]"], r"cluster\.hosts .*cluster=ssh\b.*\blocal\b"),
        (["cluster=ssh", "cluster.hosts=[a]", "cluster.python=python3"], r"cluster\.python .*'python3'"),
        (["cluster=ssh"], r"cluster\.hosts="),
        (["cluster=local"], r"launch up .*cluster=local\b"),
        (["cluster=ssh", "cluster.hosts=[a]", "cluster.name=a/b"], '"a/b"'),
    ],
)
def test_a_wrong_request_is_rejected_before_any_connection(here: Place, words: list[str], message: str) -> None:
    done = here.here("up", *words)
    assert (done.status, done.out) == (2, ""), done.err
    assert re.search(message, done.err), done.err


def test_a_dead_head_is_an_error_and_is_not_recorded(here: Place, server: servers.Server, tmp_path: Path) -> None:
    servers.write_client(tmp_path / "config", {"vm1": "127.0.0.1:1"}, server.directory / "key", server.known_hosts)
    done = here.here("up", "cluster=ssh", "cluster.hosts=[vm1]", f"cluster.ssh_config={tmp_path / 'config'}")
    assert done.status == 2
    assert "vm1" in done.err
    assert registry.all_heads() == []


def test_another_head_needs_another_name(server: servers.Server) -> None:
    registry.save(registry.Head("ssh", "ssh", ["ssh", "other"], "/p", "10.0.0.1:6379", 8265, "/there"))
    with pytest.raises(ClusterError, match="launch down ssh"):
        ssh.up(config(server, "here"), print)
    registry.save(registry.Head("cloud", "azure", ["ssh", "other"], "/p", "10.0.0.1:6379", 8265, "/there"))
    with pytest.raises(ConfigError, match=r"\bcloud\b.*\(azure\).*cluster\.name"):
        ssh.up(config(server, "here", name="cloud"), print)


# ---- commands on a host ---------------------------------------------------------------------------------------------


def test_look_returns_the_facts_about_a_host(shell: Shell, server: servers.Server) -> None:
    found = bootstrap.run_on_host(shell, "look", **PLACE, python=sys.executable)
    assert found["directory"] == f"{server.home}/.launch/pair"
    assert (found["node"], found["token"], found["rsync"]) == (None, None, True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", found["address"])
    assert not found["address"].startswith("127."), "other hosts would reach themselves"
    assert found["python"] == sys.executable
    (server.home / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (server.home / "python").chmod(0o700)
    in_home = bootstrap.run_on_host(shell, "look", **PLACE, python="~/python")
    assert (in_home["python"], in_home["versions"]) == (f"{server.home}/python", found["versions"])
    bootstrap.check_versions("here", sys.executable, found["versions"])
    assert not (server.home / ".launch").exists(), "look changes nothing"


def test_other_versions_are_an_error(shell: Shell) -> None:
    versions = {"python": "3.11.2", "ray": "1.0"}
    with pytest.raises(HostError, match=r"\bray is 1\.0 on here and .*, torch is .* on here"):
        bootstrap.check_versions("here", "/usr/bin/python3", versions)
    assert bootstrap.run_on_host(shell, "look", **PLACE, python="/no/python")["python"] is None


def test_a_host_without_python_is_an_error(server: servers.Server, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for program in ("sh", "head"):
        (tmp_path / "bare" / program).symlink_to(f"/usr/bin/{program}")

    class Bare(Shell):
        def run(self, script: str, **options: object) -> str:
            return super().run(f"PATH='{tmp_path}/bare'; {script}", **options)  # type: ignore[arg-type]

    with pytest.raises(HostError, match=r"^here .*\bPython\b"):
        bootstrap.run_on_host(Bare(server.words), "look", **PLACE)


def test_an_environment_is_created_once_and_named_by_its_contents(shell: Shell, server: servers.Server) -> None:
    wheel = server.directory / "tiny-1.0-py3-none-any.whl"
    _write_wheel(wheel)
    version = "{}.{}".format(*sys.version_info)
    first = Environment(version, f"tiny @ file://{wheel}\n", "")
    second = Environment(version, f"tiny @ file://{wheel}\n", "tiny==1.0\n")
    assert first.digest != second.digest

    python = first.create(shell, "~/.launch", "pair")
    assert python == f"{server.home}/.launch/envs/{first.digest}/bin/python"
    assert subprocess.run([python, "-c", "import tiny"], check=False).returncode == 0
    stamp = Path(python).lstat().st_mtime_ns
    assert first.create(shell, "~/.launch", "pair") == python
    assert Path(python).lstat().st_mtime_ns == stamp

    found = bootstrap.run_on_host(shell, "look", **PLACE, python=None, digest=first.digest)
    assert found["python"] == python
    (Path(python).parents[1] / "complete").unlink()  # as after an interrupted command
    assert bootstrap.run_on_host(shell, "look", **PLACE, python=None, digest=first.digest)["python"] is None


def test_an_environment_that_cannot_be_created_reports_the_reason(shell: Shell) -> None:
    with pytest.raises(HostError, match=r"\bPython 2\.1 .*\bvenv\b"):
        Environment("2.1", "", "").create(shell, "~/.launch", "pair")


def test_an_unreachable_package_index_is_reported(tmp_path: Path) -> None:
    """Without a network, pip's last lines are about missing versions."""
    words = [sys.executable, "-m", "pip", "install", "--retries=1", "--index-url=http://127.0.0.1:9/simple", "no-such"]
    log = tmp_path / "log"
    with log.open("w") as sink, pytest.raises(on_host.CommandFailed, match=r"\(.*refused"):
        on_host._run(words, sink, log)
    with (
        log.open("w") as sink,
        pytest.raises(on_host.CommandFailed, match=r"\(log: .*\): no space"),
    ):
        on_host._run(["sh", "-c", "echo no space; exit 1"], sink, log)


def test_the_environment_is_that_of_the_lock() -> None:
    own = Environment.own()
    assert own == Environment.own()
    assert "--require-hashes" in own.requirements
    assert own.constraints == ""
    names = {re.split(r"[^A-Za-z0-9-]", line)[0] for line in own.requirements.splitlines()}
    assert {"torch", "ray", "mlxtend"} <= names
    assert not {"pytest", "ruff", "accelerate"} & names


def _write_wheel(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")


# ---- up, status, down -----------------------------------------------------------------------------------------------


def test_down_without_clusters_and_with_a_wrong_name(here: Place) -> None:
    assert here.here("down").status == 0
    wrong = here.here("down", "pair")
    assert wrong.status == 2
    assert '"pair"' in wrong.err
    assert here.here("status", "pair").status == 2


def test_down_of_a_lost_host_can_be_repeated_or_forgotten(here: Place, server: servers.Server, tmp_path: Path) -> None:
    servers.write_client(tmp_path / "config", {"vm1": "127.0.0.1:1"}, server.directory / "key", server.known_hosts)
    gone = {"name": "vm1", "ssh": ["ssh", "-F", str(tmp_path / "config"), "vm1"], "python": None, "state": "lives"}
    fine = {"name": "here", "ssh": server.words, "python": None, "state": "lives"}
    never = {**gone, "name": "vm2", "touched": False}
    directory = f"{server.home}/.launch/pair"
    registry.save(
        registry.Head("pair", "ssh", server.words, "/p", "10.0.0.1:6379", 8265, directory, hosts=[fine, gone, never])
    )
    with pytest.raises(MachineError, match=r"\. vm1 .*\bhere\b"):
        ssh.down("pair", print)
    assert [host["name"] for host in registry.load("pair").hosts] == ["vm1"], "nothing was started on vm2"

    (found,) = json.loads(here.here("status", "--json").out)
    assert (found["state"], found["hosts"][0]["state"]) == ("down", "dead")
    assert here.here("down").status == 1
    assert here.here("down", "--forget").status == 0
    assert registry.all_heads() == []


def test_down_names_the_hosts_that_it_used(server: servers.Server, tmp_path: Path) -> None:
    servers.write_client(tmp_path / "config", {"vm1": "127.0.0.1:1"}, server.directory / "key", server.known_hosts)
    never = {"name": "vm1", "ssh": ["ssh", "-F", str(tmp_path / "config"), "vm1"], "python": None, "touched": False}
    fine = {"name": "here", "ssh": server.words, "python": None}
    directory = f"{server.home}/.launch/pair"
    registry.save(
        registry.Head("pair", "ssh", server.words, "/p", "10.0.0.1:6379", 8265, directory, hosts=[fine, never])
    )
    lines: list[str] = []
    ssh.down("pair", lines.append)
    (line,) = lines
    assert re.search(rf"\bpair\b.* here\. .* {directory}\.$", line), line


def test_hosts_that_ray_lost_are_reported() -> None:
    def node(address: str, ended: float, lives: bool = False) -> dict[str, Any]:
        return {"address": address, "lives": lives, "ended": ended, "why": "no\n heartbeat" if not lives else ""}

    hosts = [{"name": "vm1", "address": "10.0.0.1"}, {"name": "vm2", "address": "10.0.0.2"}, {"name": "vm3"}]
    nodes = [node("10.0.0.2", 60.0), node("10.0.0.2", 120.0), node("10.0.0.1", 0.0, lives=True)]
    (line,) = ssh._lost(hosts, [*nodes, node("10.0.0.9", 180.0)])
    assert re.fullmatch(r"Ray \w+ vm2 at \d\d:02:00 \(no heartbeat\)\.", line), line
    (line,) = ssh._lost(hosts, [*nodes, node("10.0.0.2", 0.0, lives=True)])
    assert re.match(r"Ray \w+ vm2 at \d\d:02:00 \(no heartbeat\);", line), line


def test_stop_kills_every_process_also_one_in_another_session(shell: Shell, server: servers.Server) -> None:
    """Otherwise a worker would continue to train on a machine that its user believes free."""
    directory = server.home / ".launch" / "pair"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "token").write_text("secret")
    stubborn = f"trap '' TERM; echo ready; while :; do sleep 0.1; done  # {server.port}"
    process = subprocess.Popen(
        ["sh", "-c", stubborn], env={"LAUNCH_CLUSTER": str(directory)}, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    found = bootstrap.run_on_host(shell, "stop", base=f"{server.home}/.launch", cluster="pair")
    assert found["left"] == []
    assert found["ended"] >= 1
    assert process.wait(240) == -signal.SIGKILL
    process.stdout.close()
    assert not (directory / "token").exists()
    assert bootstrap.run_on_host(shell, "stop", base=f"{server.home}/.launch", cluster="pair") == {
        "left": [],
        "ended": 0,
    }


def test_a_cluster_that_runs_with_another_python_is_not_restarted(server: servers.Server) -> None:
    """A restart would kill the runs of other commands."""
    directory = server.home / ".launch" / "other"
    directory.mkdir(parents=True)
    started = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    node = {"pid": os.getpid(), "started": started, "python": "/another/python", "head": True, "generation": "1"}
    (directory / "node.json").write_text(json.dumps(node))
    with pytest.raises(ClusterError, match=r"\bother\b.*/another/python,.*cluster\.python"):
        ssh.up(config(server, "here", name="other", python=sys.executable), print)
    assert json.loads((directory / "node.json").read_text()) == node
