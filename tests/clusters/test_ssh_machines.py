"""`cluster=ssh` on machines in network namespaces with real SSH: `up`, `status`, `down`, and training."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import servers
from tests.support.vmlab.ssh_lab import SshLab, processes_left, seen_everywhere, temporary_files_left
from tests.support.waiting import wait_for


def status(ssh_machines: SshLab) -> dict[str, str]:
    """Return the state of every host."""
    (found,) = json.loads(ssh_machines.launch("status", "--json").out)
    return {host["name"]: host["state"] for host in found["hosts"]}


@pytest.mark.parametrize("ssh_machines", [(3,)], indirect=True)
def test_up_starts_the_hosts_that_answer_and_down_leaves_nothing(ssh_machines: SshLab) -> None:
    """A dead host is named; a second `up` starts nothing; the token is private; `down` can be repeated."""
    ssh_machines.machines[2].kill()
    done = ssh_machines.launch("up", *ssh_machines.words(), seconds=200)
    assert (done.status, done.out) == (1, ""), done.err
    assert "The cluster ssh is up without vm3" in done.err
    assert "vm3 is left out: vm3 refuses connections to its SSH port" in done.err
    assert "each, less the files that are up to date" in done.err
    assert status(ssh_machines) == {"vm1": "lives", "vm2": "lives", "vm3": "dead"}

    before = {host.name: set(host.find("raylet/raylet")) for host in ssh_machines.machines}
    again = ssh_machines.launch("up", "--partial", *ssh_machines.words())
    assert (again.status, again.out) == (0, "ssh\n"), again.err
    assert {host.name: set(host.find("raylet/raylet")) for host in ssh_machines.machines} == before, "Ray was restarted"

    assert temporary_files_left(ssh_machines), "Ray's temporary files are elsewhere, where this test does not look"

    token = (ssh_machines.own(ssh_machines.machines[0]) / ".launch" / "ssh" / "token").read_text()
    assert len(token) == 64
    assert token == (ssh_machines.own(ssh_machines.machines[1]) / ".launch" / "ssh" / "token").read_text()
    assert seen_everywhere(ssh_machines, token) == []

    interrupted = ssh_machines.start("down")
    wait_for(lambda: any("on_host" in words for words in _commands(ssh_machines)), 30, "down contacted no host")
    os.killpg(interrupted.pid, signal.SIGKILL)
    assert interrupted.wait() == -signal.SIGKILL, "down was not interrupted"
    done = ssh_machines.launch("down")
    assert done.status == 0, done.err
    assert processes_left(ssh_machines) == {}
    assert temporary_files_left(ssh_machines) == {}
    assert "No process of the cluster ssh is left on vm1, vm2" in done.err


def _commands(ssh_machines: SshLab) -> list[str]:
    return [words for host in ssh_machines.machines for words in host.processes().values()]


@pytest.mark.slow
@pytest.mark.parametrize("ssh_machines", [(3,)], indirect=True)
def test_a_restarted_host_rejoins_and_a_host_that_is_removed_from_the_list_is_stopped(ssh_machines: SshLab) -> None:
    assert ssh_machines.launch("up", *ssh_machines.words(), seconds=200).status == 0
    ssh_machines.machines[1].kill()
    assert status(ssh_machines) == {"vm1": "lives", "vm2": "dead", "vm3": "lives"}
    ssh_machines.start_sshd(ssh_machines.machines[1])
    (found,) = json.loads(ssh_machines.launch("status", "--json").out)
    assert "Ray is not running on vm2. `launch up` starts it." in " ".join(found["notes"])
    done = ssh_machines.launch("up", *ssh_machines.words())
    assert "vm2: Ray runs as a node at" in done.err
    assert status(ssh_machines) == dict.fromkeys(("vm1", "vm2", "vm3"), "lives")

    done = ssh_machines.launch("up", *ssh_machines.words("vm1", "vm2"))
    assert "vm3 was removed from the cluster, and none of its processes is left on it" in done.err
    assert ssh_machines.of_clusters(ssh_machines.machines[2]) == []
    (found,) = json.loads(ssh_machines.launch("status", "--json").out)
    assert [note for note in found["notes"] if "Ray lost vm2" not in note] == [], "vm3 was removed, not lost"
    # If the head has lost its state, it and its nodes are restarted.
    ssh_machines.machines[0].kill()
    ssh_machines.start_sshd(ssh_machines.machines[0])
    assert ssh_machines.launch("up", *ssh_machines.words("vm1", "vm2"), seconds=200).status == 0
    assert status(ssh_machines) == {"vm1": "lives", "vm2": "lives"}
    assert ssh_machines.launch("down", "ssh").status == 0
    assert processes_left(ssh_machines) == {}


@pytest.mark.slow
@pytest.mark.parametrize("running", ["raylet/raylet", "gcs_server"])
def test_an_interrupted_up_can_be_repeated_and_ended(ssh_machines: SshLab, running: str) -> None:
    """No process may be left that no record names."""
    interrupted = ssh_machines.start("up", *ssh_machines.words())
    wait_for(lambda: ssh_machines.machines[0].find(running), 60, "Ray was not started")
    os.killpg(interrupted.pid, signal.SIGKILL)
    assert interrupted.wait() == -signal.SIGKILL, "up was not interrupted"
    ssh_machines.machines[0].cut()
    done = ssh_machines.launch("down", "ssh")
    assert done.status == 1, done.err
    assert "The cluster ssh is not completely down. vm1 does not answer" in done.err
    ssh_machines.machines[0].restore_link()
    done = ssh_machines.launch("down", "ssh")
    assert done.status == 0, done.err
    assert processes_left(ssh_machines) == {}

    interrupted = ssh_machines.start("up", *ssh_machines.words())
    wait_for(lambda: ssh_machines.machines[0].find(running), 60, "Ray was not started")
    os.killpg(interrupted.pid, signal.SIGKILL)
    assert interrupted.wait() == -signal.SIGKILL, "up was not interrupted"
    done = ssh_machines.launch("up", *ssh_machines.words(), seconds=200)
    assert done.status == 0, done.err
    assert status(ssh_machines) == {"vm1": "lives", "vm2": "lives"}
    assert ssh_machines.launch("down").status == 0
    assert processes_left(ssh_machines) == {}


@pytest.mark.parametrize("ssh_machines", [(2, "100mbit")], indirect=True)
def test_the_head_is_dead_the_key_is_wrong_the_link_is_slow(ssh_machines: SshLab, tmp_path: Path) -> None:
    ssh_machines.machines[0].cut()
    begun = time.monotonic()
    done = ssh_machines.launch("up", *ssh_machines.words())
    assert done.status == 2
    assert "The head of the cluster ssh (its first host) cannot be used. vm1 does not answer" in done.err
    assert time.monotonic() - begun < 100, "the system would retry for two minutes"
    ssh_machines.machines[0].restore_link()

    config = ssh_machines.config.read_text()
    another = servers.make_key(tmp_path / "another")
    ssh_machines.config.write_text(config.replace(str(ssh_machines.key), str(another)))
    refused = ssh_machines.launch("up", *ssh_machines.words())
    assert refused.status == 2
    assert "vm1 rejects this user" in refused.err
    assert processes_left(ssh_machines) == {}
    ssh_machines.config.write_text(config)

    (ssh_machines.calling / ".gitignore").write_text("data/\n")
    (ssh_machines.calling / "data").mkdir()
    (ssh_machines.calling / "data" / "big.bin").write_bytes(os.urandom(2**20))
    (ssh_machines.calling / "kept.bin").write_bytes(os.urandom(2**20))
    ssh_machines.laptop.run(["git", "init", "-q"], cwd=ssh_machines.calling)
    ssh_machines.machines[1].cut()
    done = ssh_machines.launch("up", "--partial", *ssh_machines.words(), seconds=200)
    assert done.status == 0, done.err
    assert "vm2 is left out: vm2 does not answer" in done.err
    (copy,) = (ssh_machines.own(ssh_machines.machines[0]) / ".launch" / "ssh" / "projects").iterdir()
    assert (copy / "kept.bin").stat().st_size == 2**20
    assert not (copy / "data").exists()
    ssh_machines.machines[1].restore_link()
    assert ssh_machines.launch("up", *ssh_machines.words(), seconds=200).status == 0
    assert status(ssh_machines) == {"vm1": "lives", "vm2": "lives"}
    assert ssh_machines.launch("down").status == 0
    assert processes_left(ssh_machines) == {}
