"""`cluster=ssh` on machines in network namespaces with real SSH: `up`, `status`, `down`, and training."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import servers
from tests.support.command import Place
from tests.support.engine_ranks import assert_same_weights, final_weights
from tests.support.vmlab.ssh_lab import SshLab
from tests.support.waiting import wait_for


def status(ssh_machines: SshLab) -> dict[str, str]:
    """Return the state of every host."""
    (found,) = json.loads(ssh_machines.launch("status", "--json").out)
    return {host["name"]: host["state"] for host in found["hosts"]}


def left(ssh_machines: SshLab) -> dict[str, list[str]]:
    """Return the processes of clusters by machine, without machines that have none."""
    found = {host.name: ssh_machines.of_clusters(host) for host in ssh_machines.machines}
    return {name: words for name, words in found.items() if words}


def seen_everywhere(ssh_machines: SshLab, secret: str, environments: bool = True) -> list[str]:
    """Return where a secret is visible: command lines and environments of processes, and files.

    A file `token` that only its user can read is not a finding.
    """
    found = []
    for host in ssh_machines.hosts:
        for pid, words in host.processes().items():
            if secret in words:
                found.append(f"command line on {host.name}: {words}")
            try:
                if environments and secret.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(f"environment on {host.name}: {words}")
            except OSError:
                continue
    for folder, _, names in os.walk(ssh_machines.directory):
        for path in (Path(folder, name) for name in names):
            if path.is_file() and secret.encode() in path.read_bytes():
                mode = path.stat().st_mode & 0o777
                if path.name != "token" or mode != 0o600:
                    found.append(f"{path} ({mode:o})")
    return found


@pytest.mark.parametrize("ssh_machines", [(3,)], indirect=True)
@pytest.mark.timeout(900)
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
    assert left(ssh_machines) == {}
    assert not list(ssh_machines.scratch.glob("lr-*"))
    assert "No process of the cluster ssh is left on vm1, vm2" in done.err


def _commands(ssh_machines: SshLab) -> list[str]:
    return [words for host in ssh_machines.machines for words in host.processes().values()]


@pytest.mark.slow
@pytest.mark.parametrize("ssh_machines", [(3,)], indirect=True)
@pytest.mark.timeout(900)
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
    assert left(ssh_machines) == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
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
    assert left(ssh_machines) == {}

    interrupted = ssh_machines.start("up", *ssh_machines.words())
    wait_for(lambda: ssh_machines.machines[0].find(running), 60, "Ray was not started")
    os.killpg(interrupted.pid, signal.SIGKILL)
    assert interrupted.wait() == -signal.SIGKILL, "up was not interrupted"
    done = ssh_machines.launch("up", *ssh_machines.words(), seconds=200)
    assert done.status == 0, done.err
    assert status(ssh_machines) == {"vm1": "lives", "vm2": "lives"}
    assert ssh_machines.launch("down").status == 0
    assert left(ssh_machines) == {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ssh_machines", [(2, "100mbit")], indirect=True)
def test_the_head_is_dead_the_key_is_wrong_the_link_is_slow(ssh_machines: SshLab, tmp_path: Path) -> None:
    ssh_machines.machines[0].cut()
    begun = time.monotonic()
    done = ssh_machines.launch("up", *ssh_machines.words())
    assert done.status == 2
    assert "The head of the cluster ssh (its first host) cannot be used. vm1 does not answer" in done.err
    assert time.monotonic() - begun < 30
    ssh_machines.machines[0].restore_link()

    config = ssh_machines.config.read_text()
    another = servers.make_key(tmp_path / "another")
    ssh_machines.config.write_text(config.replace(str(ssh_machines.key), str(another)))
    refused = ssh_machines.launch("up", *ssh_machines.words())
    assert refused.status == 2
    assert "vm1 rejects this user" in refused.err
    assert left(ssh_machines) == {}
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
    assert left(ssh_machines) == {}


# ---- a run on them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ssh_machines", [(3,)], indirect=True)  # one machine replaces the lost one
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ssh_machines", [(3,)], indirect=True)
def test_weights_are_bit_identical_after_the_loss_of_a_machine(ssh_machines: SshLab, here: Place) -> None:
    """One worker per machine; one process has the same weights; no secret is visible."""
    job = ["experiment=mnist", "trainer.epochs=6", "trainer.deterministic=true", "logging.graph=false"]
    runs, planted = ssh_machines.calling / "runs", "pl4nted-" + "5ec7e7"
    assert ssh_machines.launch("up", *ssh_machines.words(), seconds=200).status == 0
    workers = ["scaling.workers=2", "scaling.cpus_per_worker=2", "checkpoint.every=20", "cluster.env=[PLANTED]"]
    training = ssh_machines.start(*job, "cluster=ssh", "run.name=two", *workers, PLANTED=planted)

    def steps() -> int:
        assert training.poll() is None, ssh_machines.laptop.log()[-3000:]
        return len((runs / "two" / "metrics.jsonl").read_text().splitlines()) if (runs / "two").exists() else 0

    wait_for(lambda: (runs / "two" / "metrics.jsonl").exists() and steps() >= 4, 120, "it does not train")
    assert seen_everywhere(ssh_machines, planted, environments=False) == []
    lost = next(host for host in ssh_machines.machines[1:] if host.find("RayTrainWorker"))
    lost.kill()
    assert training.wait(150) == 0, ssh_machines.laptop.log()[-3000:]
    found = json.loads((runs / "two" / "result.json").read_text())
    assert (found["status"], found["restarts"], found["workers"]) == ("completed", 1, 2)

    def notes() -> list[str]:
        (cluster,) = json.loads(ssh_machines.launch("status", "--json").out)
        return list(cluster["notes"])

    # Ray declares a node lost late: the run may have ended by then.
    wait_for(lambda: any(note.startswith(f"Ray lost {lost.name} at ") for note in notes()), 60, "Ray lost no node")
    assert any(f"{lost.name} refuses connections" in note for note in notes())
    done = ssh_machines.launch("up", *ssh_machines.words())
    assert f"{lost.name} is left out" in done.err
    assert any(note.startswith(f"Ray lost {lost.name} at ") for note in notes()), "its name is missing"

    assert here.here(*job, "cluster=none", "run.name=two").status == 0
    assert_same_weights(final_weights(here.runs / "two"), final_weights(runs / "two"))
    ssh_machines.start_sshd(lost)
    assert ssh_machines.launch("down").status == 0
    assert left(ssh_machines) == {}
    assert seen_everywhere(ssh_machines, planted) == []
