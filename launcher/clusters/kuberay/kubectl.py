"""Giving manifests to Kubernetes and following a RayJob, through the `kubectl` of the user."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from launcher.errors import ClusterError, MachineError

_SECONDS = 60.0  # for an answer
_LOOK_SECONDS = 3.0
_PATIENCE_SECONDS = 300.0  # while the cluster cannot be reached: the job goes on
FINAL = ("Complete", "Failed", "ValidationFailed")  # of jobDeploymentStatus

# What kubectl says -> what that means, and what to do. The first that is found counts.
_SAID = (
    (
        r"no matches for kind|doesn't have a resource type",
        "the cluster does not know RayJob: KubeRay is not installed there. Install it: helm install kuberay-operator "
        "kuberay/kuberay-operator --version 1.7.0",
    ),
    (
        r"forbidden",
        "your account may not do that there. Ask for a role that may create rayjobs.ray.io in this namespace (and "
        "persistentvolumes, where cluster.mounts names storage), or take another with cluster.namespace",
    ),
    (r"Unauthorized|must be logged in|credentials", "it does not accept your login. Log in again: az login, kubelogin"),
    (
        r"AlreadyExists|already exists",
        "there is one of this name already. Take another run.name, or remove that one with kubectl delete rayjob",
    ),
    (
        r"refused|no such host|timeout|timed out|Unable to connect|unreachable",
        "the cluster cannot be reached from here. See whether it is started (az aks start), and your network",
    ),
    (
        r"current-context is not set|does not exist|no context",
        "kubectl knows no such cluster. az aks get-credentials --resource-group GROUP --name NAME tells it one, "
        "cluster.context=NAME chooses another",
    ),
)


class Kubectl:
    """One cluster and namespace.

    Args:
        context: None for kubectl's current one.
    """

    def __init__(self, context: str | None, namespace: str) -> None:
        self._words = ["kubectl", *(["--context", context] if context else []), "--namespace", namespace]

    def check(self) -> str:
        """Return the context that is meant.

        Raises:
            ClusterError: there is no kubectl here, or it knows no cluster.
        """
        if shutil.which("kubectl") is None:
            raise ClusterError(
                "cluster=kuberay was asked for, and there is no kubectl here to give it to. Install it (az aks "
                "install-cli), or print the manifest for somebody else with launch plan."
            )
        if "--context" in self._words:
            return self._words[2]
        return self._do(["config", "current-context"], "Asking kubectl for its cluster").strip()

    def create(self, manifest: str) -> None:
        """Create everything in a manifest; the server judges it as a whole first, without creating anything.

        Raises:
            ClusterError: it would not take it.
        """
        self._do(["create", "--dry-run=server", "-f", "-"], "Kubernetes was asked to judge the manifest", manifest)
        self._do(["create", "-f", "-"], "Kubernetes was given the manifest", manifest)

    def status(self, name: str) -> dict[str, Any]:
        """Return `status` of a RayJob. Raises ClusterError."""
        told = self._do(["get", "rayjobs.ray.io", name, "-o", "json"], f"Asking for the RayJob {name}")
        status: dict[str, Any] = json.loads(told).get("status") or {}
        return status

    def follow(self, name: str, say: Callable[[str], None], out: Callable[[str], None]) -> dict[str, Any]:
        """Follow a RayJob to its end and return its last status.

        Args:
            say: gets what becomes of it, a line each.
            out: gets what the driver prints, line by line.

        Raises:
            MachineError: the cluster could not be asked for minutes; the job may go on.
        """
        before, since, lost_at = "", None, None
        while True:
            try:
                status = self.status(name)
                lost_at = None
            except ClusterError as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _PATIENCE_SECONDS:
                    raise MachineError(f"{error} The job may go on there: kubectl get rayjob {name} tells.") from None
                time.sleep(_LOOK_SECONDS)
                continue
            state = str(status.get("jobDeploymentStatus") or "")
            if state and state != before:
                say(f"{name} is {state.lower()}")
                before = state
            if state == "Running" or (state in FINAL[:2] and since is None and status.get("jobId")):
                self._logs(name, since, out)
                since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if state in FINAL:
                return status
            time.sleep(_LOOK_SECONDS)

    def _logs(self, name: str, since: str | None, out: Callable[[str], None]) -> None:
        """Pass on the driver's lines until they end; who submits the job prints them."""
        words = [*self._words, "logs", "--follow", f"job/{name}", *([f"--since-time={since}"] if since else [])]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    out(line.rstrip("\n"))
            except BaseException:
                process.kill()
                raise

    def _do(self, words: list[str], what: str, given: str | None = None) -> str:
        try:
            done = subprocess.run(
                [*self._words, *words], input=given, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{what}: no answer in {_SECONDS:.0f} seconds. See whether the cluster is up.") from None
        if done.returncode == 0:
            return done.stdout
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        meaning = next((told for text, told in _SAID if re.search(text, done.stderr)), None)
        raise ClusterError(f"{what}, but {meaning}. ({said})" if meaning else f"{what}: {said}.")
