"""Create Kubernetes objects and follow a RayJob, with the `kubectl` of the user."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from launcher.clusters.kuberay.pods import StartupCheck
from launcher.errors import ClusterError, MachineError

_RESPONSE_SECONDS = 60.0
_POLL_SECONDS = 3.0
_UNREACHABLE_SECONDS = 300.0  # time without a response after which following stops; the job continues
FINAL = ("Complete", "Failed", "ValidationFailed")  # values of jobDeploymentStatus

# Pattern of kubectl's error -> cause and remedy. The first match counts.
_KNOWN_ERRORS = (
    (
        r"no matches for kind|doesn't have a resource type",
        "the cluster has no resource RayJob, so KubeRay is not installed. Install it: helm install kuberay-operator "
        "kuberay/kuberay-operator --version 1.7.0",
    ),
    (
        r"forbidden",
        "your account is not allowed to do this. Request a role that may create rayjobs.ray.io in this namespace (and "
        "persistentvolumes, if cluster.mounts names storage), or choose another namespace with cluster.namespace",
    ),
    (
        r"Unauthorized|must be logged in|credentials",
        "the cluster does not accept your login. Log in again with az login and kubelogin",
    ),
    (
        r"AlreadyExists|already exists",
        "a RayJob of this name already exists. Choose another run.name, or remove it with kubectl delete rayjob",
    ),
    (
        r"refused|no such host|timeout|timed out|Unable to connect|unreachable",
        "the cluster is unreachable from this machine. Check that it is started (az aks start), and your network",
    ),
    (
        r"current-context is not set|does not exist|no context",
        "kubectl has no such cluster. Add it with az aks get-credentials --resource-group GROUP --name NAME, or choose "
        "another one with cluster.context=NAME",
    ),
)


class Kubectl:
    """One cluster and namespace.

    Args:
        context: the context of kubectl; None: the current one.
        namespace: the namespace of all objects.
    """

    def __init__(self, context: str | None, namespace: str) -> None:
        self._command = ["kubectl", *(["--context", context] if context else []), "--namespace", namespace]

    def check(self) -> str:
        """Return the name of the context.

        Raises:
            ClusterError: kubectl is not installed, or has no current context.
        """
        if shutil.which("kubectl") is None:
            raise ClusterError(
                "cluster=kuberay needs kubectl, but it is not on PATH. Install it (az aks install-cli), or print the "
                "manifest with `launch plan` and submit it from another machine."
            )
        if "--context" in self._command:
            return self._command[2]
        return self._run(["config", "current-context"], "Reading the current context of kubectl").strip()

    def create(self, manifest: str) -> None:
        """Create all objects of a manifest. The server first validates all of them without creating any.

        Raises:
            ClusterError: the server rejected the manifest.
        """
        self._run(["create", "--dry-run=server", "-f", "-"], "The validation of the manifest", manifest)
        self._run(["create", "-f", "-"], "The creation of the RayJob", manifest)

    def status(self, name: str) -> dict[str, Any]:
        """Return the field `status` of a RayJob. Raises ClusterError."""
        status: dict[str, Any] = self._get(["rayjobs.ray.io", name], f"Reading the RayJob {name}").get("status") or {}
        return status

    def pods(self, ray_cluster: str) -> list[dict[str, Any]]:
        """Return the pods of a RayCluster. Raises ClusterError."""
        words = ["pods", "--selector", f"ray.io/cluster={ray_cluster}"]
        pods: list[dict[str, Any]] = self._get(words, f"Listing the pods of {ray_cluster}").get("items") or []
        return pods

    def warnings(self) -> list[dict[str, Any]]:
        """Return the events of type Warning in the namespace. Raises ClusterError."""
        words = ["events", "--field-selector", "type=Warning"]
        events: list[dict[str, Any]] = self._get(words, "Listing the events of the namespace").get("items") or []
        return events

    def follow(self, name: str, report: Callable[[str], None]) -> dict[str, Any]:
        """Follow a RayJob until it ends, and return its last status.

        Args:
            report: called with each line: changes of the state, reasons why pods do not start, and the driver's output.

        Raises:
            MachineError: the cluster was unreachable for minutes. The job may still run.
        """
        previous, since, silent_since = "", None, None
        startup = StartupCheck(self.pods, self.warnings, report)
        while True:
            try:
                status = self.status(name)
                silent_since = None
            except ClusterError as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _UNREACHABLE_SECONDS:
                    raise MachineError(
                        f"{error} The RayJob may still run; check it with: kubectl get rayjob {name}."
                    ) from None
                time.sleep(_POLL_SECONDS)
                continue
            state = str(status.get("jobDeploymentStatus") or "")
            if state and state != previous:
                report(f"{name} is {state.lower()}")
                previous = state
            if state == "Running" or (state in FINAL[:2] and since is None and status.get("jobId")):
                self._print_log(name, since, report)
                since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            if state in FINAL:
                return status
            if state != "Running":
                startup.check(name, status)
            time.sleep(_POLL_SECONDS)

    def _print_log(self, name: str, since: str | None, report: Callable[[str], None]) -> None:
        """Report the driver's output, which the submitter's pod prints, until it ends."""
        options = [f"--since-time={since}"] if since else []
        command = [*self._command, "logs", "--follow", f"job/{name}", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    report(line.rstrip("\n"))
            except BaseException:
                process.kill()
                raise

    def _get(self, words: list[str], action: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._run(["get", *words, "-o", "json"], action))
        return found

    def _run(self, words: list[str], action: str, stdin: str | None = None) -> str:
        try:
            done = subprocess.run(
                [*self._command, *words],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=_RESPONSE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(
                f"{action} failed: no response within {_RESPONSE_SECONDS:.0f} s. Check that the cluster is running."
            ) from None
        if done.returncode == 0:
            return done.stdout
        output = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        cause = next((cause for pattern, cause in _KNOWN_ERRORS if re.search(pattern, done.stderr)), None)
        raise ClusterError(f"{action} failed: {cause}. ({output})" if cause else f"{action} failed: {output}.")
