"""The acceptance run: confirmation, no secrets in its report, and removal of the cluster after any failure."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.azure_acceptance import nodes, training
from benchmarks.azure_acceptance.__main__ import Refused, asked_of, confirm, main
from benchmarks.azure_acceptance.commands import Commands
from benchmarks.azure_acceptance.estimate import Estimate, estimate
from benchmarks.azure_acceptance.report import FAILED, NOT_CHECKED, PASSED, Report, judged
from benchmarks.azure_acceptance.session import Session
from tests.azure import vms
from tests.azure.fake import SUBSCRIPTION, Fake
from tests.azure.vms import Vms

SIZE = "Standard_NC4as_T4_v3"
WORDS = [f"cluster.size={SIZE}", "cluster.budget_usd=5"]
PLAN = Estimate(
    usd_per_hour=1.2, node_usd_per_hour=0.5, budget_usd=5, minutes=45, seconds_per_step=None, prices_from="a list"
)
# A replacement of `launch` that records its arguments, and exits as the environment variable DOES specifies.
PROGRAM = """
import json, os, signal, sys
verb = sys.argv[1]
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
does = json.loads(os.environ["DOES"]).get(verb, 0)
if does == "interrupt":
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
print("words of a failure", file=sys.stderr)
sys.exit(does)
"""


# ---- before anything is created --------------------------------------------------------------------------------------


def test_nothing_is_created_without_a_yes(
    azure: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert main([*WORDS, "--offline", "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().err
    assert "1.24 USD" not in output  # the on-demand price
    assert " USD " in output
    assert "--yes" in output
    assert azure.groups == {}
    assert not [one for one in azure.requests if one.startswith(("PUT", "POST"))]
    assert not (tmp_path / "out" / "report.md").exists()


def test_a_cluster_that_exists_is_not_removed(
    azure: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    azure.groups["launch-acceptance"] = {"id": "/x", "name": "launch-acceptance", "location": "eastus"}
    monkeypatch.setattr("benchmarks.azure_acceptance.__main__.planned", lambda *given: PLAN)
    assert main([*WORDS, "--yes", "--out", str(tmp_path / "out")]) == 2
    assert "launch-acceptance exists" in capsys.readouterr().err
    assert list(azure.groups) == ["launch-acceptance"]


@pytest.mark.parametrize(("typed", "starts"), [("yes\n", True), ("y\n", False), ("", False)])
def test_only_yes_starts(typed: str, starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return typed

    monkeypatch.setattr("sys.stdin", Terminal())
    if starts:
        confirm(PLAN, yes=False)
    else:
        with pytest.raises(Refused):
            confirm(PLAN, yes=False)


@pytest.mark.parametrize(
    "words",
    [
        ["cluster.budget_usd=5"],
        [f"cluster.size={SIZE}"],
        [*WORDS, "cluster=ssh"],
        [*WORDS, "cluster.nodes=8"],
        [*WORDS, "run.root=/tmp/x"],
        [*WORDS, "cluster.down_after=true"],
        [*WORDS, "-m"],
    ],
)
def test_rejected_arguments(words: list[str]) -> None:
    with pytest.raises(Refused):
        asked_of(words, [], 3, None)


def test_arguments_of_the_run_are_not_part_of_the_plan() -> None:
    asked = asked_of([*WORDS, "cluster.name=mine", "trainer.precision=float16"], ["scaling.workers=1"], 3, None)
    assert asked.name == "mine"
    assert "scaling.workers=2" in asked.plan
    assert "trainer.precision=float16" in asked.plan
    assert "scaling.workers=1" in asked.train
    assert "scaling.workers=2" not in asked.train
    assert all(word.startswith("cluster") for word in asked.cluster)


def test_a_plan_without_a_price_or_over_the_budget_is_rejected() -> None:
    plan = {
        "usd_per_hour": 1.2,
        "nodes_usd_per_hour": 1.0,
        "nodes": {"count": 2},
        "budget": {"usd": 5.0},
        "seconds_per_step": 0.001,
        "notes": ["The price is not known."],
    }
    found = estimate(plan, 3, 2)
    assert found.node_usd_per_hour == 0.5
    assert found.limit_minutes == pytest.approx(250)
    for change in ({"usd_per_hour": 0.0}, {"budget": None}, {"budget": {"usd": 0.1}}):
        with pytest.raises(ValueError):
            estimate({**plan, **change}, 3, 2)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_contains_no_identifying_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted0value0of0a0secret")
    secrets = (
        SUBSCRIPTION,
        "20.55.1.17",
        "fe80::1:2ff:fe03:4",
        "00:0d:3a:12:34:56",
        "https://runs.dfs.core.windows.net/x",
        "abfss://runs@account.dfs.core.windows.net/x",
        "head-0.internal.cloudapp.net",
        "ray-acceptance-3f2a-worker-1b2c",
        "ada@example.com",
        socket.gethostname(),
        "a-vm-of-mine",
        "0123456789abcdef0123456789abcdef",
        "hf_planted0value0of0a0secret",
        f"/subscriptions/{SUBSCRIPTION}/resourceGroups/x",
        "/home/ada",
    )
    report = Report(tmp_path)
    report.scrub.learn(["a-vm-of-mine", "head-0.internal.cloudapp.net"])
    report.facts = {"versions": "torch 2.11.0", "note": secrets[0]}
    for secret in secrets:
        report.add(judged("a check", f"it printed '{secret}' and [{secret}]", f"not {secret}", False))
    report.add(judged("driver", "550.90.07, 4.2 Gbit/s at 15:20:33 | 24.04", "a driver", True))
    for name in ("report.md", "report.json"):
        text = (tmp_path / name).read_text()
        for secret in (one for one in secrets if len(one) > 3):  # a short host name may be part of a word
            assert secret.lower() not in text.lower(), (name, secret)
        assert "550.90.07, 4.2 Gbit/s at 15:20:33" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert [one["verdict"] for one in content["checks"]] == [FAILED] * len(secrets) + [PASSED]
    cells = (tmp_path / "report.md").read_text().splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", cells)) == 5


# ---- the order of things ---------------------------------------------------------------------------------------------


class Cloud:
    """A fake of the client that a session uses."""

    group = "launch-acceptance"

    def __init__(self) -> None:
        self.present = True

    def exists(self) -> bool:
        return self.present

    def left(self) -> list[str]:
        return ["Microsoft.Compute/disks"]

    def workers(self) -> list[dict[str, Any]]:
        return []


Ran = tuple[Session, Cloud, Report, Callable[[], list[str]]]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    def make(**does: Any) -> Ran:
        (tmp_path / "program.py").write_text(PROGRAM)
        monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
        monkeypatch.setenv("DOES", json.dumps(does))
        commands = Commands(tmp_path / "work", tmp_path / "private", (sys.executable, str(tmp_path / "program.py")))
        cloud, report = Cloud(), Report(tmp_path)
        cloud.present = does.get("left", False)
        made = Session(asked_of(WORDS, [], 0.01, None), PLAN, commands, cloud, report)  # type: ignore[arg-type]
        return made, cloud, report, lambda: [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]

    return make


def verdicts(report: Report) -> dict[str, str]:
    return {row.check: row.verdict for row in report.rows}


def test_a_failed_check_does_not_skip_the_others(session: Callable[..., Ran]) -> None:
    made, _, report, calls = session(status=1, train=1)
    made.run()
    assert calls()[0] == "up"
    assert calls()[-1] == "down"
    assert {"status", "train"} <= {*calls()}
    found = verdicts(report)
    assert found["GPU nodes"] == found["training on two nodes"] == found["eviction of a node"] == FAILED
    assert found["autoscaling to zero"] == found["`launch down`"] == found["the resource group is gone"] == PASSED
    assert found["Blob run root"] == found["Azure's bill"] == NOT_CHECKED


def test_a_cluster_that_failed_to_start_is_removed(session: Callable[..., Ran]) -> None:
    made, _, report, calls = session(up=1)
    made.run()
    assert calls() == ["up", "down"]
    assert verdicts(report)["eviction of a node"] == NOT_CHECKED
    assert "words of a failure" in report.rows[0].found


@pytest.mark.parametrize("verb", ["up", "status", "train"])
def test_the_cluster_is_removed_after_ctrl_c(session: Callable[..., Ran], verb: str) -> None:
    made, _, report, calls = session(**{verb: "interrupt"})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            made.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls()[-2:] == [verb, "down"]
    assert verdicts(report)["uninterrupted"] == FAILED
    assert verdicts(report)["the resource group is gone"] == PASSED


def test_a_group_that_still_exists_is_a_failure(session: Callable[..., Ran]) -> None:
    made, _, report, calls = session(down=1, left=True)
    made.run()
    assert calls().count("down") == 3
    assert verdicts(report)["`launch down`"] == verdicts(report)["the resource group is gone"] == FAILED
    assert "Microsoft.Compute/disks" in next(row.found for row in report.rows if "group" in row.check)


# ---- verdicts --------------------------------------------------------------------------------------------------------

NODE = {
    "azure": True,
    "pci": 1,
    "gpus": ["Tesla T4"],
    "driver": "550.90.07",
    "torch": "2.11.0",
    "cuda": "12.6",
    "cuda_devices": 1,
    "interfaces": {"eth0": "hv_netvsc", "enP1s1": "mlx5_core"},
    "default": "eth0",
    "events": True,
    "agent": True,
    "image": {"publisher": "microsoft-dsvm", "offer": "ubuntu-hpc", "sku": "2404", "version": "24.04.1"},
    "os": "Ubuntu 24.04.1 LTS",
    "priority": "Spot",
}
SUMS = {"right": True, "gbit": 7.1, "nccl": "2.27.3", "transport": "Socket", "interface": "eth0"}


def test_correct_nodes_pass() -> None:
    found = list(nodes.rows([NODE, NODE], SUMS, spot=True))
    assert {row.verdict for row in found} == {PASSED}
    assert len(found) == 7


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"driver": ""}, "GPU driver"),
        ({"cuda_devices": 0}, "CUDA in PyTorch"),
        ({"interfaces": {"eth0": "hv_netvsc"}}, "accelerated networking"),
        ({"image": {}}, "image"),
        ({"events": False}, "spot notice path"),
        ({"agent": False}, "spot notice path"),
        ({"priority": "Regular"}, "spot nodes"),
    ],
)
def test_one_wrong_node_fails_its_check(change: dict[str, Any], check: str) -> None:
    found = list(nodes.rows([NODE, {**NODE, **change}], SUMS, spot=True))
    assert [row.check for row in found if row.verdict == FAILED] == [check]


@pytest.mark.parametrize(
    "sums", [{**SUMS, "right": False}, {**SUMS, "interface": ""}, {"why": "no GPU"}, {"error": "x"}]
)
def test_wrong_sums_fail(sums: dict[str, Any]) -> None:
    found = list(nodes.rows([NODE, NODE], sums, spot=True))
    assert [row.check for row in found if row.verdict == FAILED] == ["NCCL between the nodes"]


def test_a_fake_never_passes_checks_of_real_hardware() -> None:
    fake = {**NODE, "azure": False}
    found = {row.check: row.verdict for row in nodes.rows([fake, fake], SUMS, spot=True)}
    assert found.pop("spot notice path") == PASSED
    assert {*found.values()} == {NOT_CHECKED}


RESULT = {
    "status": "stopped",
    "reason": "signal",
    "preemptions": 1,
    "lost_steps": 0,
    "restarts": 0,
    "world_sizes": [2, 1],
    "seconds": 600.0,
    "cost_usd": 0.17,
    "samples": 10_000,
    "steps": 100,
    "samples_per_second": 1000.0,
}


def judge(
    result: dict[str, Any], evicted: bool = True, noticed: bool = True, step: float | None = 0.05
) -> dict[str, str]:
    plan = Estimate(1.2, 0.5, 5, 45, step, "a list")
    return {row.check: row.verdict for row in training.rows(result, plan, evicted, noticed)}


def test_a_correct_run_passes() -> None:
    assert {*judge(RESULT).values()} == {PASSED}


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"status": "failed"}, "end of the run"),
        ({"preemptions": 0}, "steps lost by the eviction"),
        ({"lost_steps": 40}, "steps lost by the eviction"),
        ({"restarts": 1}, "steps lost by the eviction"),
        ({"cost_usd": 0.3}, "recorded cost of the run"),
        ({"cost_usd": 0.05}, "recorded cost of the run"),
        ({"cost_usd": None}, "recorded cost of the run"),
        ({"samples_per_second": 1e5}, "time of a step"),
    ],
)
def test_a_wrong_run_fails_its_check(change: dict[str, Any], check: str) -> None:
    found = judge({**RESULT, **change})
    assert [name for name, verdict in found.items() if verdict == FAILED] == [check]


def test_an_eviction_without_a_notice_fails() -> None:
    assert judge(RESULT, noticed=False)["steps lost by the eviction"] == FAILED


def test_events_that_did_not_happen_are_not_checked() -> None:
    found = judge(RESULT, evicted=False, step=None)
    assert found["steps lost by the eviction"] == found["time of a step"] == NOT_CHECKED


def test_only_spot_nodes_can_be_evicted(azure: Fake) -> None:
    from benchmarks.azure_acceptance.cloud import Cloud as Account
    from launcher.errors import ClusterError

    place = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/launch-x/providers/Microsoft.Compute/virtualMachines"
    disk = {"osDisk": {"managedDisk": {"id": "/disk"}}}
    for name, priority in (("a", "Spot"), ("b", "Regular")):
        one = {"id": f"{place}/{name}", "name": name, "properties": {"priority": priority, "storageProfile": disk}}
        azure.resources[f"{place}/{name}".lower()] = one
    Account("x", None).evict("a")
    with pytest.raises(ClusterError, match="spot virtual machines alone"):
        Account("x", None).evict("b")
    assert [vm["name"] for vm in azure.of_type("microsoft.compute/virtualmachines")] == ["b"]


# ---- all of it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab() -> Iterator[Vms]:
    if problem := vms.why_not():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    with Vms(4) as lab:  # a head, two nodes, and a replacement of the evicted one
        yield lab


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_acceptance_run(lab: Vms) -> None:
    """Run the command on the laptop. Checks that the fake supports pass; GPUs and NCCL are not checked."""
    out = lab.directory / "acceptance"
    run = ["scaling.device=cpu", "scaling.cpus_per_worker=3", "trainer.log_every=5", "checkpoint.every=200"]
    words = [*WORDS, "cluster.ssh_from=10.77.0.0/24", "cluster.idle_minutes=1", "--yes", "--offline"]
    words += ["--minutes=0.3", f"--out={out}", *(f"--train={word}" for word in run)]
    began = time.monotonic()
    done = subprocess.run(
        lab.laptop.command([sys.executable, "-m", "benchmarks.azure_acceptance", *words]),
        env=lab.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    print(done.stderr[-20_000:], f"{time.monotonic() - began:.0f} s")
    report = json.loads((out / "report.json").read_text())
    found = {row["check"]: row["verdict"] for row in report["checks"]}
    unseen: tuple[str, ...] = (
        "GPU driver",
        "CUDA in PyTorch",
        "accelerated networking",
        "NCCL between the nodes",
        "image",
    )
    unseen += ("Blob run root", "time of a step", "Azure's bill")
    assert {check for check, verdict in found.items() if verdict == NOT_CHECKED} >= {*unseen}
    assert {check: verdict for check, verdict in found.items() if verdict == FAILED} == {}
    for check in (
        "eviction of a node",
        "steps lost by the eviction",
        "autoscaling to zero",
        "recorded cost of the run",
    ):
        assert found[check] == PASSED, check
    assert found["the resource group is gone"] == found["`launch down`"] == PASSED
    assert done.returncode == 0
    assert lab.azure.remaining("launch-acceptance") == []
    text = (out / "report.md").read_text() + (out / "report.json").read_text()
    for secret in (SUBSCRIPTION, lab.azure.token, "10.77.0.", socket.gethostname(), "worker-"):
        assert secret not in text, secret
