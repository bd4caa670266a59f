"""Connections to other machines: hosts are not options, ports are not public, host keys are compared."""

from __future__ import annotations

import io
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.cli.open_port import confirmed
from launcher.clusters.azure import failures, network, ray_yaml
from launcher.clusters.azure.kind import ANYWHERE
from launcher.clusters.kuberay.kind import KubeRayCluster
from launcher.clusters.kuberay.manifest import manifests
from launcher.clusters.kuberay.ray_job import ray_job
from launcher.clusters.remote import mounts
from launcher.clusters.remote.shell import Shell, destination
from launcher.config import compose
from launcher.errors import ConfigError, HostError
from tests.azure.test_spec import LOCAL, spec_of

OPTION = "-oProxyCommand=touch${IFS}mark"


@pytest.mark.parametrize(
    "words",
    [
        [f'cluster.hosts=["{OPTION}"]'],
        ['cluster.hosts=["ada@-oProxyCommand=x"]'],
        ['cluster.hosts=["-oProxyCommand=x@vm1"]'],
        ["cluster.hosts=[vm1]", 'cluster.user="-oProxyCommand=x"'],
        ["cluster.hosts=[vm1]", 'cluster.user="a;touch mark"'],
        ['cluster.hosts=["vm1;touch"]'],
        ['cluster.hosts=["$(touch)"]'],
        ['cluster.hosts=["[-oX]"]'],
        ["cluster.hosts=[vm1]", "cluster.ssh_key=-oX"],
        ["cluster.hosts=[vm1]", "cluster.ssh_config=-oX"],
    ],
)
def test_no_host_is_an_option(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.(hosts|user|ssh_key|ssh_config)") as refused:
        compose(["cluster=ssh", *words])
    assert refused.value.exit_status == 2


@pytest.mark.parametrize("host", ["vm1", "ada@vm1:22", "a.da@10.0.0.4", "[fe80::1%eth0]:2222", "::1", "my_alias-2"])
def test_hosts_are_hosts(host: str) -> None:
    words = ["cluster=ssh", f'cluster.hosts=["{host}"]', "cluster.user=CORP\\\\ada"]
    assert asdict(compose(words).job.cluster)["hosts"] == [host]


def test_ssh_and_rsync_read_nothing_behind_the_options_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stubs that record their arguments."""
    for name in ("ssh", "rsync"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" END >> {tmp_path}/words\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    shell = Shell(destination("vm1", "ada"))
    with pytest.raises(HostError, match=r"ada@vm1 .* 0: ") as raised:  # the stub prints nothing
        shell.run("true")
    assert raised.value.cause == "failed"
    shell.send(tmp_path, ["a"], "/there")
    shell.fetch("/there/a", tmp_path)
    shell.close()
    calls = (tmp_path / "words").read_text().split("END\n")[:-1]
    assert len(calls) == 4
    for call in calls:
        before, dashes, behind = call.partition("\n--\n")
        assert dashes
        assert "vm1" in behind
        assert "vm1" not in before
    with pytest.raises(ConfigError):
        Shell(["ssh", OPTION])


@pytest.mark.parametrize("value", ["0.0.0.0/0", "::/0", "0.0.0.0/1", "*", "Internet", "10.0.0.0/33", "vm1", ""])
def test_ssh_is_not_opened_to_all_addresses_by_accident(value: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.ssh_from"):
        compose(["cluster=azure", "cluster.size=Standard_NC24ads_A100_v4", f'cluster.ssh_from="{value}"'])


@pytest.mark.parametrize(("value", "prefix"), [("203.0.113.7", "203.0.113.7"), (ANYWHERE, "0.0.0.0/0")])
def test_ssh_is_opened_to_the_given_addresses(value: str, prefix: str) -> None:
    from dataclasses import asdict

    words = ["cluster=azure", "cluster.size=Standard_NC24ads_A100_v4", f"cluster.ssh_from={value}"]
    cluster = compose(words).job.cluster
    template = network.template(replace(spec_of(), ssh_from=asdict(cluster)["ssh_from"]))
    (group,) = [part for part in template["resources"] if part["type"].endswith("networkSecurityGroups")]
    rules = group["properties"]["securityRules"]
    assert [rule["properties"]["sourceAddressPrefix"] for rule in rules] == [prefix]


def test_ray_compares_host_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.clusters.azure.provider import Provider

    monkeypatch.setenv(failures.VARIABLE, str(tmp_path / "failures"))
    provider: Any = Provider.__new__(Provider)
    provider.provider_config = ray_yaml.ray_config(spec_of(), LOCAL)["provider"]
    kinds = {"vm-head": "head", "vm-node": "worker"}
    monkeypatch.setattr(Provider, "node_tags", lambda self, node: {"ray-node-type": kinds[node]})
    options = {}
    for node in kinds:
        auth = {"ssh_user": "ubuntu", "ssh_private_key": "key"}
        runner = provider.get_command_runner("", node, auth, "demo", subprocess, True)
        options[node] = " ".join(runner.ssh_options.to_ssh_options_list())
    for said in options.values():
        assert "StrictHostKeyChecking=accept-new" in said
        assert "/dev/null" not in said
    assert f"UserKnownHostsFile={LOCAL.known_hosts}" in options["vm-head"]
    assert "HostKeyAlias=vm-node" in options["vm-node"]  # another machine may have had its address before


def test_no_package_of_another_user_is_installed(tmp_path: Path) -> None:
    """Another user of the node may create a file with a fixed name in /tmp, which root would install."""
    lines = mounts.setup_lines(mounts.read({"/data": "abfss://data@account.dfs.core.windows.net/x"}))
    install = lines[0]
    assert "/tmp" not in install
    tools = tmp_path / "bin"
    tools.mkdir()
    stand_ins = {
        "apt-cache": "exit 1",
        "apt-get": "exit 0",
        "curl": 'while [ "$1" != -fsSLo ]; do shift; done; [ ! -e "$2" ] && echo theirs > "$2"',
        "dpkg": f'echo "$2" > {tmp_path}/installed; ls -ld "$(dirname "$2")" > {tmp_path}/mode',
        "sudo": 'exec "$@"',
    }
    for name, body in stand_ins.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "TMPDIR": str(scratch)}
    subprocess.run(["sh", "-c", install], env=environment, check=True, timeout=240)
    assert (tmp_path / "installed").read_text().startswith(str(scratch))
    assert (tmp_path / "mode").read_text().startswith("drwx------")
    assert list(scratch.iterdir()) == []


def pods() -> dict[str, dict[str, Any]]:
    cluster = compose(
        [
            *("cluster=kuberay", "cluster.size=Standard_NC24ads_A100_v4", "cluster.image=registry/launch:1"),
            *("cluster.env=[DB_PASSWORD]", "cluster.secret=ours", "cluster.service_account=trainer"),
        ]
    ).job.cluster
    assert isinstance(cluster, KubeRayCluster)
    job = ray_job(cluster, "a", "abfss://runs@account.dfs.core.windows.net/runs", [], ask=False)
    spec = manifests(job)[-1]["spec"]["rayClusterSpec"]
    return {
        "head": spec["headGroupSpec"]["template"]["spec"],
        **{group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]},
    }


def test_workers_of_a_rayjob_have_no_token_of_kubernetes() -> None:
    found = pods()
    assert len(found) > 1
    assert [spec.get("automountServiceAccountToken") for name, spec in found.items() if name != "head"] == [False]


@pytest.mark.parametrize(
    ("word", "passes"),
    [
        ("vars.db={host: h, password: hunter2}", False),
        ("vars.db={login: {credentials: [hunter2]}}", False),
        ("vars.note=hf_hunter2hunter2hunter2hunter2", False),
        ("vars.db={host: h, password: '${oc.env:DB_PASSWORD}'}", True),
    ],
)
def test_a_rayjob_takes_nested_secrets_by_reference(word: str, passes: bool) -> None:
    from launcher.cli import batch
    from launcher.cli.line import parse

    line = parse(["train", "cluster=kuberay", word])
    if passes:
        assert word in batch._words_for_head(line, shares_files=False)
    else:
        with pytest.raises(ConfigError, match=r"\*\*\*") as refused:
            batch._words_for_head(line, shares_files=False)
        assert "hunter2" not in str(refused.value)


def test_a_node_shows_no_password_of_a_requirement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of pip and of a shell are visible in the list of processes."""
    from launcher.clusters.remote import node_setup

    monkeypatch.setattr("launcher.clusters.remote.from_driver.adopt", lambda: None)
    calls: list[list[str]] = []

    def run(words: list[str], **options: Any) -> Any:
        calls.append([*words, *(Path(word).read_text() for word in words if word.endswith((".txt", ".sh")))])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    wanted = {"file": None, "packages": ["x @ https://ada:hunter2@host/x.whl"], "setup": ["login --password hunter2"]}
    assert node_setup._work()(str(tmp_path), str(tmp_path), wanted) == ""
    words = [word for call in calls for word in call[: -2 if "-m" in call else -1]]
    assert "hunter2" not in " ".join(words)
    assert any("hunter2@host" in call[-1] for call in calls)
    assert calls[-1][-1] == "login --password hunter2\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("word", "typed", "becomes"),
    [
        ("cluster.ssh_from=0.0.0.0/0", "y\n", "cluster.ssh_from=anywhere"),
        ("cluster.ssh_from='::/0'", "yes\n", "cluster.ssh_from=anywhere"),
        ("cluster.ssh_from=0.0.0.0/0", "\n", None),
        ("cluster.ssh_from=0.0.0.0/0", "", None),
        ("cluster.ssh_from=8.0.0.0/6", "y\n", None),
    ],
)
def test_opening_ssh_to_all_addresses_needs_a_confirmation_on_a_terminal(
    word: str, typed: str, becomes: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert confirmed([word]) == [word]
    monkeypatch.setattr("sys.stdin", _Terminal(typed))
    monkeypatch.setattr("sys.stderr", asked := _Terminal())
    assert confirmed(["a=1", word]) == ["a=1", becomes or word]
    assert bool(asked.getvalue()) is ("/0" in word)


def test_a_refusal_to_open_the_port_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["up", "cluster=azure", "cluster.size=Standard_NC4as_T4_v3", "cluster.ssh_from=0.0.0.0/0"]) == 2
    assert "cluster.ssh_from=anywhere" in capsys.readouterr().err
