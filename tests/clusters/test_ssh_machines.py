"""`cluster=ssh` on machines that are reached over real SSH: what comes up, what is told, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.engine_ranks import assert_same_weights, final_weights
from tests.support.vmlab.elsewhere import Elsewhere
from tests.support.waiting import wait_for


def status(there: Elsewhere) -> dict[str, str]:
    """Return the state of every host."""
    (found,) = json.loads(there.launch("status", "--json").out)
    return {host["name"]: host["state"] for host in found["hosts"]}


def left(there: Elsewhere) -> dict[str, list[str]]:
    """Return the processes on the machines that are not SSH's own, where there are any."""
    found = {host.name: there.of_clusters(host) for host in there.machines}
    return {name: words for name, words in found.items() if words}


def seen_everywhere(there: Elsewhere, secret: str, environments: bool = True) -> list[str]:
    """Return where a secret is seen: in processes' command lines and environments, and in files.

    The token's own files are no find where they are for their user alone.
    """
    found = []
    for host in there.hosts:
        for pid, words in host.processes().items():
            if secret in words:
                found.append(f"command line on {host.name}: {words}")
            try:
                if environments and secret.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(f"environment on {host.name}: {words}")
            except OSError:
                continue
    for folder, _, names in os.walk(there.directory):
        for path in (Path(folder, name) for name in names):
            if path.is_file() and secret.encode() in path.read_bytes():
                mode = path.stat().st_mode & 0o777
                if path.name != "token" or mode != 0o600:
                    found.append(f"{path} ({mode:o})")
    return found


@pytest.mark.parametrize("there", [(3,)], indirect=True)
@pytest.mark.timeout(900)
def test_what_answers_comes_up_and_down_leaves_nothing(there: Elsewhere) -> None:
    """The dead host is named; a second `up` starts nothing; the token is its user's; an interrupted `down` repeats."""
    there.machines[2].kill()
    done = there.launch("up", *there.words(), seconds=200)
    assert (done.status, done.out) == (0, "ssh\n"), done.err
    assert "vm3 is left out: vm3 is there, and nothing listens on its SSH port" in done.err
    assert "each, or what differs of it" in done.err
    assert status(there) == {"vm1": "lives", "vm2": "lives", "vm3": "dead"}

    before = {host.name: set(host.find("raylet/raylet")) for host in there.machines}
    again = there.launch("up", *there.words())
    assert again.status == 0, again.err
    assert {host.name: set(host.find("raylet/raylet")) for host in there.machines} == before, "it was started anew"

    token = (there.own(there.machines[0]) / ".launch" / "ssh" / "token").read_text()
    assert len(token) == 64
    assert token == (there.own(there.machines[1]) / ".launch" / "ssh" / "token").read_text()
    assert seen_everywhere(there, token) == []

    interrupted = there.start("down")
    wait_for(lambda: any("on_host" in words for words in _commands(there)), 30, "down asked nobody")
    os.killpg(interrupted.pid, signal.SIGKILL)
    assert interrupted.wait() == -signal.SIGKILL, "down was not interrupted"
    done = there.launch("down")
    assert done.status == 0, done.err
    assert left(there) == {}
    assert not list(there.scratch.glob("lr-*"))
    assert "Nothing of the cluster ssh runs on vm1, vm2" in done.err


def _commands(there: Elsewhere) -> list[str]:
    return [words for host in there.machines for words in host.processes().values()]


@pytest.mark.parametrize("there", [(3,)], indirect=True)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_host_that_comes_back_joins_and_one_that_is_named_no_more_leaves(there: Elsewhere) -> None:
    assert there.launch("up", *there.words(), seconds=200).status == 0
    there.machines[1].kill()
    assert status(there) == {"vm1": "lives", "vm2": "dead", "vm3": "lives"}
    there.start_sshd(there.machines[1])
    (found,) = json.loads(there.launch("status", "--json").out)
    assert "On vm2 no Ray runs; `launch up` starts it." in " ".join(found["notes"])
    done = there.launch("up", *there.words())
    assert "vm2: Ray runs as a node at" in done.err
    assert status(there) == dict.fromkeys(("vm1", "vm2", "vm3"), "lives")

    done = there.launch("up", *there.words("vm1", "vm2"))
    assert "vm3 is no longer among the hosts, and nothing of the cluster runs there any more" in done.err
    assert there.of_clusters(there.machines[2]) == []
    (found,) = json.loads(there.launch("status", "--json").out)
    assert [note for note in found["notes"] if "Ray lost vm2" not in note] == [], "it was let go, and not lost"
    # The head loses everything: what its nodes have is of no use without it.
    there.machines[0].kill()
    there.start_sshd(there.machines[0])
    assert there.launch("up", *there.words("vm1", "vm2"), seconds=200).status == 0
    assert status(there) == {"vm1": "lives", "vm2": "lives"}
    assert there.launch("down", "ssh").status == 0
    assert left(there) == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("running", ["raylet/raylet", "gcs_server"])
def test_an_interrupted_up_can_be_repeated_and_ended(there: Elsewhere, running: str) -> None:
    """Would be wrong: machines on which something runs that nobody knows of."""
    interrupted = there.start("up", *there.words())
    wait_for(lambda: there.machines[0].find(running), 60, "Ray was not started")
    os.killpg(interrupted.pid, signal.SIGKILL)
    assert interrupted.wait() == -signal.SIGKILL, "up was not interrupted"
    there.machines[0].cut()
    done = there.launch("down", "ssh")
    assert done.status == 1, done.err
    assert "The cluster ssh is not all down. vm1 does not answer" in done.err
    there.machines[0].mend()
    done = there.launch("down", "ssh")
    assert done.status == 0, done.err
    assert left(there) == {}

    interrupted = there.start("up", *there.words())
    wait_for(lambda: there.machines[0].find(running), 60, "Ray was not started")
    os.killpg(interrupted.pid, signal.SIGKILL)
    assert interrupted.wait() == -signal.SIGKILL, "up was not interrupted"
    done = there.launch("up", *there.words(), seconds=200)
    assert done.status == 0, done.err
    assert status(there) == {"vm1": "lives", "vm2": "lives"}
    assert there.launch("down").status == 0
    assert left(there) == {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("there", [(2, "100mbit")], indirect=True)
def test_the_head_is_dead_the_key_is_wrong_the_link_is_slow(there: Elsewhere, tmp_path: Path) -> None:
    there.machines[0].cut()
    begun = time.monotonic()
    done = there.launch("up", *there.words())
    assert done.status == 2
    assert "The head of the cluster ssh, the first of its hosts, cannot be used. vm1 does not answer" in done.err
    assert time.monotonic() - begun < 30
    there.machines[0].mend()

    config = there.config.read_text()
    from tests.support import servers

    another = servers.make_key(tmp_path / "another")
    there.config.write_text(config.replace(str(there.key), str(another)))
    refused = there.launch("up", *there.words())
    assert refused.status == 2
    assert "vm1 answers, and does not let this user in" in refused.err
    assert left(there) == {}
    there.config.write_text(config)

    (there.calling / ".gitignore").write_text("data/\n")
    (there.calling / "data").mkdir()
    (there.calling / "data" / "big.bin").write_bytes(os.urandom(2**20))
    (there.calling / "kept.bin").write_bytes(os.urandom(2**20))
    there.laptop.run(["git", "init", "-q"], cwd=there.calling)
    there.machines[1].cut()
    done = there.launch("up", *there.words(), seconds=200)
    assert done.status == 0, done.err
    assert "vm2 is left out: vm2 does not answer" in done.err
    (copy,) = (there.own(there.machines[0]) / ".launch" / "ssh" / "projects").iterdir()
    assert (copy / "kept.bin").stat().st_size == 2**20
    assert not (copy / "data").exists()
    there.machines[1].mend()
    assert there.launch("up", *there.words(), seconds=200).status == 0
    assert status(there) == {"vm1": "lives", "vm2": "lives"}
    assert there.launch("down").status == 0
    assert left(there) == {}


# ---- a run on them --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_a_machine_lost_during_training_costs_no_bit(there: Elsewhere) -> None:
    """One worker a machine; the weights are those of one process and of two workers here; no secret is seen."""
    job = ["experiment=mnist", "trainer.epochs=6", "trainer.deterministic=true", "logging.graph=false"]
    runs, planted = there.calling / "runs", "pl4nted-" + "5ec7e7"
    assert there.launch("up", *there.words(), seconds=200).status == 0
    workers = ["scaling.workers=2", "scaling.cpus_per_worker=2", "checkpoint.every=20", "cluster.env=[PLANTED]"]
    training = there.start(*job, "cluster=ssh", "run.name=two", *workers, PLANTED=planted)

    def steps() -> int:
        assert training.poll() is None, there.laptop.log()[-3000:]
        return len((runs / "two" / "metrics.jsonl").read_text().splitlines()) if (runs / "two").exists() else 0

    wait_for(lambda: (runs / "two" / "metrics.jsonl").exists() and steps() >= 4, 120, "it does not train")
    assert seen_everywhere(there, planted, environments=False) == []
    lost = next(host for host in there.machines[1:] if host.find("RayTrainWorker"))
    lost.kill()
    assert training.wait(150) == 0, there.laptop.log()[-3000:]
    found = json.loads((runs / "two" / "result.json").read_text())
    assert (found["status"], found["restarts"], found["workers"]) == ("completed", 1, 2)

    def notes() -> list[str]:
        (cluster,) = json.loads(there.launch("status", "--json").out)
        return list(cluster["notes"])

    # Ray takes its time to hold a node for lost: a run can be at its end by then.
    wait_for(lambda: any(note.startswith(f"Ray lost {lost.name} at ") for note in notes()), 60, "Ray lost nobody")
    assert any(f"{lost.name} is there, and nothing listens" in note for note in notes())
    done = there.launch("up", *there.words())
    assert f"{lost.name} is left out" in done.err
    assert any(note.startswith(f"Ray lost {lost.name} at ") for note in notes()), "its name is forgotten"

    for kind in (["cluster=none"], ["cluster=local", "scaling.workers=2", "scaling.cpus_per_worker=0.5"]):
        here = there.launch(*job, *kind)
        assert here.status == 0, here.err
        assert_same_weights(final_weights(Path(here.last)), final_weights(runs / "two"))
    there.start_sshd(lost)
    assert there.launch("down").status == 0
    assert left(there) == {}
    assert seen_everywhere(there, planted) == []
