"""RayJobs: golden manifests, validation with KubeRay's schema, submitting and following."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from launcher.clusters.kuberay import kubectl as kubectl_module
from launcher.clusters.kuberay import pods as pods_module
from launcher.clusters.kuberay.kind import KIND, KubeRayCluster
from launcher.clusters.kuberay.manifest import ENTRYPOINT, manifests, text
from launcher.clusters.kuberay.ray_job import LONGEST_NAME, RayJob, name_of, ray_job
from launcher.errors import ConfigError
from tests.support.command import TOY, Place, Result

HERE = Path(__file__).resolve().parent
STORE = "abfss://runs@ada.dfs.core.windows.net/runs"
BASE: dict[str, Any] = {"kind": "kuberay", "size": "NC24ads_A100_v4", "image": "ghcr.io/ada/launch:1"}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"nodes": 2}, STORE),
    "everything": (
        {
            "size": "NC96ads_A100_v4",
            "nodes": 8,
            "min_nodes": 2,
            "spot": "prefer",
            "idle_minutes": 5.0,
            "namespace": "ml",
            "env": ["HF_TOKEN"],
            "secret": "tokens",
            "service_account": "trainer",
            "pull_secrets": ["registry"],
            "tolerations": [{"key": "team", "operator": "Equal", "value": "vision", "effect": "NoSchedule"}],
            "node_selector": {"agentpool": "gpu", "shared": True},
            "priority_class": "research",
            "budget_usd": 50.0,
            "mounts": {"/data": "abfss://sets@ada.dfs.core.windows.net/imagenet/2012", "/shared": "claim://runs"},
        },
        "/shared/runs",
    ),
    "spot": ({"spot": True}, STORE),
}


def job(name: str) -> RayJob:
    more, root = CASES[name]
    words = ["experiment=gpt2", "optimizer.groups=[{match: 'fc.*', lr: 1e-3}]"]
    return ray_job(KubeRayCluster(**{**BASE, **more}), "a1", root, words, ask=False)


def head_of(made: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return spec


# ---- the manifest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_manifest_is_the_golden_one(name: str) -> None:
    found = text(job(name)).replace(version("ray"), "RAY")
    file = HERE / f"{name}.yaml"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(found)
    assert found == file.read_text()


def crd() -> dict[str, Any]:
    """Return KubeRay's schema, changed to reject unknown fields, which Kubernetes drops silently."""
    schema: dict[str, Any] = json.loads(gzip.decompress((HERE / "rayjob_v1.json.gz").read_bytes()))

    def close(part: Any) -> None:
        if isinstance(part, dict):
            if "properties" in part and "x-kubernetes-preserve-unknown-fields" not in part:
                part.setdefault("additionalProperties", False)
            if part.pop("x-kubernetes-int-or-string", False):
                part.pop("type", None)
                part["anyOf"] = [{"type": "integer"}, {"type": "string"}]
            for each in part.values():
                close(each)
        elif isinstance(part, list):
            for each in part:
                close(each)

    close(schema)
    # A CRD has no fields of metadata, because Kubernetes defines them.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def templates(schema: dict[str, Any]) -> dict[str, Any]:
    """Allow metadata of pods, for the same reason."""
    cluster = schema["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"]["items"]):
        group["properties"]["template"]["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(templates(crd()))


@pytest.mark.parametrize("name", CASES)
def test_kuberay_supports_every_field(validator: jsonschema.Draft7Validator, name: str) -> None:
    *volumes, made = manifests(job(name))
    assert [str(error.message) for error in validator.iter_errors(made)] == []
    assert {volume["kind"] for volume in volumes} <= {"PersistentVolume", "PersistentVolumeClaim"}


@pytest.mark.parametrize(
    ("at", "key", "value"),
    [
        ((), "shutdownAfterJobEnds", True),
        (("rayClusterSpec", "autoscalerOptions"), "idleTimeout", 5),
        (("rayClusterSpec", "authOptions"), "mode", "password"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "resource", {}),
    ],
)
def test_the_schema_rejects_unknown_fields(
    validator: jsonschema.Draft7Validator, at: tuple[Any, ...], key: str, value: Any
) -> None:
    made = json.loads(json.dumps(manifests(job("plain"))[-1]))
    part = made["spec"]
    for step in at:
        part = part[step]
    part[key] = value
    assert list(validator.iter_errors(made)) != []


@pytest.mark.parametrize(
    ("run", "expected"),
    [("mnist-20261124-033000", None), ("My_Run.2", "my-run-2"), ("7", "run-7"), ("ü", "run"), ("a" * 80, "a" * 47)],
)
def test_names_are_valid_in_kubernetes(run: str, expected: str | None) -> None:
    name = name_of(run)
    assert name == (expected or run)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(name) <= LONGEST_NAME


@pytest.mark.parametrize(
    ("change", "root", "message"),
    [
        ({"size": None}, STORE, "needs cluster.size=SIZE"),
        ({"image": None}, STORE, "needs cluster.image="),
        ({}, "runs", "run.root=runs is a directory in a pod"),
        ({}, "head:///var/runs", "is a directory in a pod"),
        ({"mounts": {"/shared": "claim://a"}}, "/sharedruns", "is a directory in a pod"),
        ({"mounts": {"/data": "abfss://sets@ada.dfs.core.windows.net"}}, "/data/runs", "is a directory in a pod"),
        ({"env": ["HF_TOKEN"]}, STORE, "kubectl create secret generic NAME"),
        ({"min_nodes": 0}, STORE, "cluster.min_nodes=0"),
        ({"min_nodes": 3, "nodes": 2}, STORE, "cluster.nodes=2"),
        ({"size": "NC24rs_v3"}, STORE, "retired"),
    ],
)
def test_invalid_configurations_are_rejected(change: dict[str, Any], root: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ray_job(KubeRayCluster(**{**BASE, **change}), "a1", root, [], ask=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pull_secrets", ["My Secret"]),
        ("priority_class", "a_b"),
        ("tolerations", ["team=vision:NoSchedule"]),
        ("tolerations", [{"keys": "team"}]),
        ("tolerations", [{"key": "team", "effect": "Never"}]),
        ("node_selector", {"pool": {"a": "b"}}),
    ],
)
def test_invalid_pod_settings_are_rejected(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.{key}"):
        KIND.check(KubeRayCluster(**{key: value}))


def test_settings_apply_to_the_right_pods() -> None:
    """The head may be in another node pool than the workers, so labels of nodes are for workers only."""
    spec = manifests(job("everything"))[-1]["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    worker = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    submitter = spec["submitterPodTemplate"]["spec"]
    for pod in (head, worker, submitter):
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["priorityClassName"] == "research"
        assert pod["tolerations"][-1]["key"] == "team"
    assert "nodeSelector" not in head
    assert worker["nodeSelector"]["agentpool"] == "gpu"
    assert worker["nodeSelector"]["shared"] == "true", "Kubernetes rejects labels that are not text"
    assert worker["nodeSelector"]["node.kubernetes.io/instance-type"] == "Standard_NC96ads_A100_v4"
    assert "submitterPodTemplate" not in manifests(job("plain"))[-1]["spec"]


def test_a_size_that_aks_does_not_support_is_a_warning() -> None:
    made = ray_job(KubeRayCluster(**{**BASE, "size": "NC144lds_xl_RTXPRO6000BSE_v6"}), "a1", STORE, [], ask=False)
    assert any("AKS" in warning for warning in made.warnings())
    assert all(f"# Warning: {warning}" in made.text() for warning in made.warnings())
    assert made.facts()["notes"] == made.warnings()
    assert job("plain").warnings() == []


def test_arguments_survive_both_shells(tmp_path: Path) -> None:
    """KubeRay's submitter and Ray's supervisor process an entrypoint with a shell, list2cmdline, and another shell."""
    odd = [
        "a b",
        "x='$HOME'",
        "[{match: 'fc.*', lr: 1e-3}]",
        "*",
        "back\\slash",
        'two "quotes"',
        "$(id)",
        "${oc.env:A}",
    ]
    request = ray_job(KubeRayCluster(**BASE), "a1", STORE, odd, ask=False)
    (variable,) = head_of(manifests(request)[-1])["containers"][0]["env"]
    value = variable["value"].replace("$$(", "$(")  # as Kubernetes expands it
    launch = tmp_path / "launch"
    launch.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    launch.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    join = "import subprocess, sys; print(subprocess.list2cmdline(sys.argv[2:]))"
    submit = f'{sys.executable} -c "{join}" -- {ENTRYPOINT} ;'
    line = subprocess.run(["bash", "-c", submit], env=path, capture_output=True, text=True, check=True).stdout.strip()
    environment = {**path, variable["name"]: value}
    ran = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == list(request.command[1:])


def test_the_image_of_the_dockerfile_is_suitable() -> None:
    """KubeRay and the manifest need wget, python on PATH, the user id, and Ray's dashboard."""
    final = (HERE.parents[2] / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert "wget" in final
    assert f"USER {head_of(manifests(job('plain'))[-1])['securityContext']['runAsUser']}\n" in final
    assert "/opt/launch/bin:$PATH" in final
    assert '"ray[default,' in (HERE.parents[2] / "pyproject.toml").read_text()


# ---- submitting and following ---------------------------------------------------------------------------------------

ARGUMENTS = (
    *TOY,
    "cluster=kuberay",
    "cluster.size=NC24ads_A100_v4",
    "cluster.image=launch:1",
    f"run.root={STORE}",
    "run.name=a1",
)
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "jobId": "x"}
STARTING = {"jobDeploymentStatus": "Initializing", "rayClusterName": "a1-raycluster-x"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "jobId": "x"}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{HERE}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path))
    monkeypatch.setenv("LAUNCH_PRICES_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(kubectl_module, "_POLL_SECONDS", 0.01)
    return tmp_path


def submit(here: Place, state: Path, responses: dict[str, Any], *more: str) -> Result:
    (state / "responses").write_text(json.dumps(responses))
    return here.here(*ARGUMENTS, *more)


def test_a_run_is_submitted_and_followed(here: Place, state: Path) -> None:
    done = submit(here, state, {"statuses": [{}, {"jobDeploymentStatus": "Initializing"}, RUNNING, None, DONE]})
    assert (done.status, done.out) == (0, f"{STORE}/a1\n"), done.err
    assert "RayJob a1 on my-aks, 1 x Standard_NC24ads_A100_v4" in done.err
    assert [state for state in ("initializing", "running", "complete") if f"a1 is {state}" not in done.err] == []
    assert "step 50  loss 0.5" in done.err
    assert (state / "validate.yaml").read_text() == (state / "create.yaml").read_text()
    head = head_of(yaml.safe_load((state / "create.yaml").read_text()))
    command = head["containers"][0]["env"][0]["value"]
    assert command.startswith(
        f"launch train --config-dir own experiment=toy run.name=a1 run.root={STORE} cluster=existing "
    )
    assert "cluster.node_usd_per_hour=" in command
    assert "launch:1" not in command
    assert not here.runs.exists()


def test_the_reason_of_a_pod_is_reported_while_following(
    here: Place, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pods_module, "PATIENCE_SECONDS", 0.0)
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "launch:1: not found"}}
    responses = {
        "statuses": [{"jobDeploymentStatus": "Initializing", "rayClusterName": "a1-raycluster-x"}] * 2
        + [RUNNING, DONE],
        "pods": [{"metadata": {"name": "a1-head"}, "status": {"containerStatuses": [{"state": waits}]}}],
    }
    done = submit(here, state, responses)
    assert done.status == 0, done.err
    assert done.err.count("ImagePullBackOff: launch:1: not found") == 1
    calls = (state / "calls").read_text()
    assert "get pods --selector ray.io/cluster=a1-raycluster-x" in calls


def test_a_failed_job_is_reported_with_its_cause(here: Place, state: Path) -> None:
    failed = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "jobId": "x", "message": "exit code 2"}
    done = submit(here, state, {"statuses": [RUNNING, failed]})
    assert done.status == 1
    assert "The RayJob a1 failed: exit code 2. Its log: kubectl --namespace default logs job/a1" in done.err


def test_a_detached_job_is_not_followed(here: Place, state: Path) -> None:
    done = submit(here, state, {}, "cluster.detach=true", "cluster.context=other", "cluster.namespace=ml")
    assert (done.status, done.out) == (0, f"{STORE}/a1\n"), done.err
    assert f"launch stop a1 run.root={STORE}" in done.err
    calls = (state / "calls").read_text().splitlines()
    assert all(call.startswith("--context other --namespace ml create") for call in calls)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ({"config": "error: current-context is not set"}, "az aks get-credentials"),
        ({"validate": 'error: no matches for kind "RayJob" in version "ray.io/v1"'}, "KubeRay is not installed"),
        (
            {"validate": 'Error from server (Forbidden): User "ada" cannot create: is forbidden'},
            "your account is not allowed",
        ),
        ({"validate": "error: You must be logged in to the server (Unauthorized)"}, "Log in again"),
        (
            {"validate": 'Error from server (AlreadyExists): rayjobs.ray.io "a1" already exists'},
            "Choose another run.name",
        ),
        ({"validate": "Unable to connect to the server: dial tcp: lookup x: no such host"}, "unreachable"),
        ({"validate": "error: something new"}, "something new"),
    ],
)
def test_a_rejection_is_reported_before_anything_is_created(
    here: Place, state: Path, fails: dict[str, str], message: str
) -> None:
    done = submit(here, state, {"fails": fails})
    assert done.status == 2
    assert message in done.err
    assert not (state / "create.yaml").exists()


def test_kubectl_is_not_installed(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(HERE.parent))
    monkeypatch.setenv("LAUNCH_PRICES_URL", "http://127.0.0.1:9/")
    done = here.here(*ARGUMENTS)
    assert done.status == 2
    assert "needs kubectl" in done.err


def test_plan_prints_the_manifest(here: Place, state: Path) -> None:
    planned = here.here("plan", "--offline", *ARGUMENTS)
    assert planned.status == 0, planned.err
    assert [part["kind"] for part in yaml.safe_load_all(planned.out)] == ["RayJob"]
    found = json.loads(here.here("plan", "--offline", "--json", *ARGUMENTS).out)
    assert (found["run"], found["directory"]) == ("a1", f"{STORE}/a1")
    assert found["manifests"] == list(yaml.safe_load_all(planned.out))
    assert not (state / "calls").exists(), "a plan sends no request to the cluster"


def test_a_sweep_is_a_rayjob_on_a_shared_volume(here: Place, state: Path) -> None:
    more = ("-m", "optimizer.lr=0.1,0.2", "run.root=/shared/runs", "cluster.mounts={/shared: claim://disk}")
    planned = here.here("plan", "--offline", *ARGUMENTS, *more)
    assert planned.status == 0, planned.err
    head = head_of(list(yaml.safe_load_all(planned.out))[-1])
    command = head["containers"][0]["env"][0]["value"]
    assert command.startswith("launch train -m --config-dir own experiment=toy optimizer.lr=0.1,0.2 run.name=a1 ")
    assert " run.root=/shared/runs cluster=existing " in command


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("+model.secret_key=hunter2",), "+model.secret_key=*** contains a secret"),
        (("-m", "optimizer.lr=0.1,0.2"), "claim://NAME"),
        (("-m", "optimizer.lr=0.1,0.2", "run.root=runs"), "is a directory in a pod"),
        (("cluster.namespace=My NS",), "cluster.namespace is 'My NS'"),
        (
            ("cluster.mounts={/data: 'https://ada.blob.core.windows.net/x?sig=hunter2'}",),
            "without a key or a signature",
        ),
    ],
)
def test_invalid_arguments_are_rejected(here: Place, state: Path, more: tuple[str, ...], message: str) -> None:
    done = here.here(*ARGUMENTS, *more)
    assert done.status == 2
    assert message in done.err
    assert "hunter2" not in done.err
    assert not (state / "calls").exists()
