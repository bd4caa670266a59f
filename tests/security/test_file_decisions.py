"""A configuration file must not decide where code runs and where secrets are sent.

The tests use an experiment or a run of another person, without an override about a cluster. At commit f746dbe each of
these files was obeyed.
"""

from __future__ import annotations

import shlex
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher import cli
from launcher.clusters.existing.kind import ExistingCluster
from launcher.clusters.local.kind import LocalCluster
from launcher.clusters.none.kind import NoCluster
from launcher.clusters.ssh.kind import SshCluster
from launcher.config import Settings, compose, sources, targets
from launcher.config.authority import guarded
from launcher.config.schema import Job, cluster_schema
from launcher.errors import LaunchError
from launcher.jobs import prepare
from launcher.runs import RunDirectory, user_state
from tests.support.command import Place

GLOBAL = "# @package _global_\n"
EVIL = "experiment/evil.yaml"
SECRET = "value-of-a-secret-variable"


def write(directory: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.fixture
def user_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of the user's own settings."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    file = tmp_path / "xdg" / "launch" / "default.yaml"
    file.parent.mkdir(parents=True)
    return file


# ---- attacks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def address() -> Iterator[tuple[str, list[bytes]]]:
    """An address of an attacker, and the requests that it has received."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    heard.append(connection.recv(65536))

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("verb", ["train", "up"])
def test_an_experiment_runs_no_command_of_ssh(verb: str, here: Place, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    write(tmp_path, {"ssh": f"Host *\n  ProxyCommand touch {shlex.quote(str(mark))}\n"})
    cluster = f"cluster: {{kind: ssh, hosts: [x], ssh_config: {tmp_path / 'ssh'}}}\n"
    own = write(tmp_path / "theirs", {EVIL: f"{GLOBAL}{cluster}"})
    done = here.here(verb, "--config-dir", str(own), "experiment=evil")
    assert (done.status, mark.exists()) == (2, False)
    for part in (str(own / EVIL), "cluster.ssh_config", "cluster=ssh", "cluster.hosts=[x]"):
        assert part in done.err


def test_an_experiment_names_no_address_for_the_token(
    here: Place, tmp_path: Path, address: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, heard = address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-of-another-cluster")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    cluster = f"cluster: {{kind: existing, address: '{url}', env: [AWS_SECRET_ACCESS_KEY]}}\n"
    own = write(tmp_path / "theirs", {EVIL: f"{GLOBAL}{cluster}"})
    assert here.here("--config-dir", str(own), "experiment=evil").status == 2
    assert heard == []


def test_the_address_of_another_persons_run_is_ignored(
    here: Place, address: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new run uses this machine, and one line names the ignored keys."""
    url, heard = address
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token-of-another-cluster")
    targets.add_calling_directory(here.directory)
    composed = compose(["cluster=none", "experiment=toy"], here.directory / "own")
    theirs = composed.to_yaml().replace("kind: none", f"kind: existing\n  address: {url}")
    assert url in theirs
    write(here.runs / "theirs", {"config.yaml": theirs, "result.json": "{}"})
    done = here.here("run.like=theirs", "run.name=mine", "cluster.keep_minutes=0", "scaling.workers=1", "cluster=none")
    assert (done.status, heard) == (0, []), done.err
    planned = here.here("plan", "run.like=theirs", "run.name=other")
    assert heard == []
    lines = [line for line in planned.err.splitlines() if "theirs/config.yaml" in line]
    assert len(lines) == 1
    assert "cluster.kind, cluster.address" in lines[0]


def test_an_experiment_names_no_object_store(
    here: Place, tmp_path: Path, address: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for verbs that only list runs, since an object store gets the credentials of this environment."""
    url, heard = address
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    root = f"s3://bucket/runs?endpoint_override={url.removeprefix('http://')}&scheme=http"
    for place in (root, "head:///tmp/runs"):
        own = write(tmp_path / "theirs", {"local/default.yaml": f"{GLOBAL}run: {{root: '{place}'}}\n"})
        done = here.here("runs", "--config-dir", str(own))
        assert (done.status, heard) == (2, [])
        assert "run.root=" in done.err


# ---- indirections ----------------------------------------------------------------------------------------------------

HOSTS = "kind: ssh\nhosts: [x]\n"
DETOURS: list[tuple[str, dict[str, str]]] = [
    ("an overlay", {EVIL: f"{GLOBAL}cluster: {{kind: ssh, hosts: [x]}}\n"}),
    ("an option of its own", {EVIL: f"{GLOBAL}defaults: [override /cluster: b]\n", "cluster/b.yaml": HOSTS}),
    ("a shipped option", {EVIL: f"{GLOBAL}defaults: [override /cluster: ssh]\n"}),
    ("a package", {EVIL: f"{GLOBAL}defaults: [/vars@cluster: b]\n", "vars/b.yaml": HOSTS}),
    ("a header", {EVIL: "# @package cluster\nkind: ssh\nhosts: [x]\n"}),
    ("a nested list", {EVIL: f"{GLOBAL}defaults: [b]\n", "experiment/b.yaml": "# @package cluster\nkind: ssh\n"}),
    ("a reference", {EVIL: f"{GLOBAL}vars: {{k: ssh}}\ncluster: {{kind: '${{vars.k}}'}}\n"}),
    ("a resolver", {EVIL: f"{GLOBAL}cluster: {{hosts: '${{oc.decode:\"[x]\"}}'}}\n"}),
    ("this machine's settings", {"local/default.yaml": f"{GLOBAL}cluster: {{env: [HOME]}}\n", EVIL: GLOBAL}),
    ("a primary configuration", {"config.yaml": "defaults: [cluster: ssh]\n", EVIL: GLOBAL}),
    ("another group", {"data/mnist.yaml": f"{GLOBAL}cluster: {{setup: [id]}}\n", EVIL: GLOBAL}),
    ("our schema's name", {"launch_schema.yaml": "cluster: {env: [A]}\n", EVIL: f"{GLOBAL}cluster: {{env: [A]}}\n"}),
]  # fmt: skip


@pytest.mark.parametrize("files", [files for _, files in DETOURS], ids=[name for name, _ in DETOURS])
def test_no_indirection_of_a_file_decides(files: dict[str, str], tmp_path: Path) -> None:
    own = write(tmp_path, files)
    with pytest.raises(LaunchError, match=r"cluster\.(kind|hosts|setup|env)") as caught:
        compose(["experiment=evil"], own)
    assert caught.value.exit_status == 2
    assert str(tmp_path) in str(caught.value)


VALUES: dict[str, str] = {
    **{"hosts": "[x]", "setup": "[id]", "env": "[HOME]", "mounts": "{/a: claim://b}"},
    **{"pull_secrets": "[x]", "tolerations": "[{key: x}]", "node_selector": "{a: b}", "sbatch_options": "[x]"},
    **{"cpus": "2", "requeue": "true", "notice_seconds": "30"},
}


@pytest.mark.parametrize("key", guarded())
def test_every_key_needs_the_user(key: str, tmp_path: Path) -> None:
    """Also with the kind that the user chose."""
    kind = "ssh" if key == "hosts" else "kuberay" if key in ("image", "mounts") else "existing"
    value = VALUES.get(key, "x")
    own = write(tmp_path, {EVIL: f"{GLOBAL}cluster: {{{key}: {value}}}\n"})
    with pytest.raises(LaunchError, match=rf"cluster\.{key}=") as caught:
        compose(["experiment=evil", f"cluster={kind}"], own)
    assert caught.value.exit_status == 2


def test_what_decides_where_code_runs_is_guarded() -> None:
    named = {"address", "hosts", "user", "python", "setup", "env", "image", "secret", "service_account", "mounts"}
    assert named | {key for key in asdict(cluster_schema()()) if key.startswith("ssh_")} <= set(guarded())


@pytest.mark.parametrize(
    "files",
    [
        {"cluster/ssh.yaml": HOSTS},
        {"cluster/ssh.yaml": f"{GLOBAL}cluster: {{kind: ssh, hosts: [x]}}\n"},
        {"cluster/ours.yaml": "defaults: [ssh]\n", "cluster/ssh.yaml": HOSTS},
    ],
)
def test_options_of_our_names_are_ours(files: dict[str, str], tmp_path: Path) -> None:
    own = write(tmp_path, files)
    name = "ours" if "cluster/ours.yaml" in files else "ssh"
    job = compose([f"cluster={name}"], own).job
    assert (job.cluster.kind, asdict(job.cluster)["hosts"]) == ("ssh", [])


def test_a_word_that_refers_to_a_file_is_not_a_choice(tmp_path: Path) -> None:
    own = write(tmp_path, {EVIL: f"{GLOBAL}vars: {{hosts: [x]}}\n"})
    with pytest.raises(LaunchError, match=r"evil\.yaml .*\bcluster\.hosts\b"):
        compose(["experiment=evil", "cluster=ssh", "cluster.hosts=${vars.hosts}"], own)
    mixed = write(tmp_path, {"cluster/ours.yaml": "kind: ssh\nhosts: '${vars.hosts}'\n"})
    with pytest.raises(LaunchError, match=r"evil\.yaml .*\bcluster\.hosts\b"):
        compose(["experiment=evil", "cluster=ours"], mixed)
    assert asdict(compose(["cluster=ours", "vars.hosts=[a]"], mixed).job.cluster)["hosts"] == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "run: {root: '/tmp/${oc.env:HIDDEN}'}\n",
        "run: {name: '${vars.a}'}\nvars: {a: '${oc.env:HIDDEN}'}\n",
        "run: {root: '/tmp/${oc.decode:${oc.env:HIDDEN,x}}'}\n",
        "hydra: {job: {env_copy: [HIDDEN]}}\nrun: {root: '/tmp/${hydra:job.env_set.HIDDEN}'}\n",
    ],
)
def test_names_do_not_interpolate_the_environment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", SECRET)
    own = write(tmp_path, {EVIL: GLOBAL + text})
    with pytest.raises(LaunchError) as caught:
        compose(["experiment=evil"], own)
    assert caught.value.exit_status == 2
    assert SECRET not in str(caught.value)
    assert compose(["run.root=/tmp/${oc.env:HIDDEN}"]).job.run.root == f"/tmp/{SECRET}"  # the user's own override


# ---- a run of another person -----------------------------------------------------------------------------------------

THEIRS = """\
cluster: {kind: ssh, hosts: [x], setup: [touch mark], nodes: 3, size: Standard_NC24ads_A100_v4}
trust: [os]
run: {root: 's3://bucket/x', name: theirs}
"""


def _stored(directory: Path, text: str) -> RunDirectory:
    kept = {"cluster", "run", "trust"}
    composed = compose([])
    from omegaconf import OmegaConf

    content = {key: value for key, value in composed.tree().items() if key not in kept}
    write(directory, {"config.yaml": OmegaConf.to_yaml(OmegaConf.create(content)) + text, "result.json": "{}"})
    return RunDirectory(directory)


def test_another_persons_run_is_used_on_this_machine_with_one_note(tmp_path: Path) -> None:
    run = _stored(tmp_path / "runs" / "theirs", THEIRS)
    lines: list[str] = []
    request = prepare.Request([], note=lines.append)
    composition, _ = prepare.over_the_run(request, run)
    assert composition.job.cluster == Job().cluster
    assert (composition.job.trust, composition.job.run.root) == ([], "runs")
    assert len(lines) == 1
    for name in ("cluster.kind", "cluster.hosts", "cluster.setup", "run.root", "trust"):
        assert name in lines[0]


def test_the_users_own_run_keeps_its_cluster(tmp_path: Path) -> None:
    """The record in the user's state directory counts, not the current content of the run's directory."""
    run = _stored(tmp_path / "runs" / "mine", THEIRS)
    user_state.record_cluster(run, asdict(SshCluster(hosts=["ada@vm1"], ssh_key="/key")))
    lines: list[str] = []
    request = prepare.Request(["trust=[mine]", "run.root=/x"], note=lines.append)
    cluster = prepare.over_the_run(request, run)[0].job.cluster
    assert cluster == SshCluster(hosts=["ada@vm1"], ssh_key="/key")
    copied = _stored(tmp_path / "runs" / "copy", THEIRS)
    assert prepare.over_the_run(request, copied)[0].job.cluster.kind == "local"
    word = prepare.Request(["cluster=existing", "cluster.address=h:1"], note=lines.append)
    assert prepare.over_the_run(word, run)[0].job.cluster == ExistingCluster(address="h:1")


# ---- ordinary use ----------------------------------------------------------------------------------------------------


def test_a_team_keeps_its_cluster_in_a_file(here: Place, tmp_path: Path) -> None:
    own = write(
        tmp_path / "team",
        {
            "cluster/ours.yaml": "defaults: [ssh, _self_]\nhosts: [ada@vm1, vm2]\nsetup: [id]\nenv: [HOME]\n",
            "experiment/toy.yaml": f"{GLOBAL}cluster: {{budget_usd: null, idle_minutes: 3}}\n",
        },
    )
    cluster = compose(["cluster=ours", "experiment=toy"], own).job.cluster
    assert cluster == SshCluster(hosts=["ada@vm1", "vm2"], setup=["id"], env=["HOME"], idle_minutes=3)
    assert asdict(compose(["cluster=ours", "cluster.hosts=[b]"], own).job.cluster)["hosts"] == ["b"]
    planned = here.here("plan", "--config-dir", str(own), "cluster=ours", "experiment=mnist_tiny", "cluster.setup=[]")
    assert planned.status == 0, planned.err
    assert "vm2" in planned.out


def test_a_file_may_choose_this_machine(tmp_path: Path) -> None:
    own = write(tmp_path, {EVIL: f"{GLOBAL}defaults: [override /cluster: none]\nrun: {{root: here}}\n"})
    job = compose(["experiment=evil"], own).job
    assert (job.cluster.kind, job.run.root) == ("none", "here")


def test_the_users_own_settings(user_file: Path, tmp_path: Path) -> None:
    user_file.write_text("cluster: {kind: ssh, hosts: [vm1], keep_minutes: 5}\nrun: {root: 's3://mine/runs'}\n")
    job = compose([]).job
    assert (job.cluster.kind, asdict(job.cluster)["hosts"], job.run.root) == ("ssh", ["vm1"], "s3://mine/runs")
    assert asdict(compose(["cluster=ssh"]).job.cluster)["hosts"] == ["vm1"]
    assert asdict(compose(["cluster=ssh", "cluster.hosts=[b]", "run.root=x"]).job.cluster)["hosts"] == ["b"]
    assert compose(["cluster=none"]).job.cluster == NoCluster()
    own = write(tmp_path, {EVIL: f"{GLOBAL}cluster: {{hosts: [x]}}\n"})
    with pytest.raises(LaunchError, match=r"evil\.yaml .*\bcluster\.hosts\b"):
        compose(["experiment=evil"], own)
    user_file.write_text("cluster: {hosts: [vm1], keep_minutes: 5}\n")
    assert asdict(compose(["cluster=ssh"]).job.cluster)["hosts"] == ["vm1"]
    assert compose([]).job.cluster == LocalCluster(keep_minutes=5)


@pytest.mark.parametrize(
    "text", ["trainer: {epochs: 3}\n", "trust: [os]\n", "run: {name: a}\n", "cluster: [a]\n", "- a\n"]
)
def test_the_users_own_settings_accept_only_locations(text: str, user_file: Path) -> None:
    user_file.write_text(text)
    with pytest.raises(LaunchError, match=r"default\.yaml"):
        compose([])


def test_our_own_files_decide_nothing() -> None:
    """Each shipped experiment composes without an override about a cluster."""
    for name in sources().groups()["experiment"]:
        assert compose([f"experiment={name}"]).job.cluster == Job().cluster


def test_help_still_shows_the_configuration_directory(here: Place) -> None:
    assert cli.run(["train", "--help", "--config-dir", "own"]) == 0


def test_a_head_uses_the_cluster_section_of_the_submitting_command(tmp_path: Path) -> None:
    """The user's settings and records are on the user's machine; files on the head must not decide."""
    cluster = SshCluster(hosts=["ada@vm1"], env=["HOME"])
    settings = Settings.decided(asdict(cluster))
    run = _stored(tmp_path / "theirs", THEIRS)
    words = ["run.name=a", f"run.root={tmp_path}"]
    for more in ([], ["cluster=ssh"], ["run.like=theirs"], ["cluster=existing", "cluster.env=[HOME]"]):
        request = prepare.Request([*words, *more], on_head="head:1", settings=settings)
        job = prepare.prepare(request).job
        assert (job.cluster.kind, asdict(job.cluster)["address"], job.cluster.env) == ("existing", "head:1", ["HOME"])
        assert (job.cluster.setup, job.trust) == ([], [])
    assert run.exists()
