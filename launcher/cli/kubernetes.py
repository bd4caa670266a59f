"""Runs and sweeps as RayJobs of Kubernetes: `plan` prints the manifest, `train` submits it and follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from launcher.cli.output import say
from launcher.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from launcher.cli.line import Line
    from launcher.clusters.kuberay.ray_job import RayJob

KIND = "kuberay"


def is_meant(line: Line) -> bool:
    """Whether the words choose cluster=kuberay, or the user's own settings; the last one counts."""
    from launcher.config.settings import user_settings

    pairs = [word.partition("=") for word in line.words]
    chosen = [value for key, _, value in pairs if key in ("cluster", "cluster.kind")]
    return (chosen[-1] if chosen else user_settings().choice) == KIND


def plan(line: Line, result: Callable[[str], None]) -> int:
    """Print the manifest; `kubectl apply -f -` takes it."""
    from launcher.clusters.kuberay.ray_job import manifests, text

    job = _job(line)
    if "json" in line.flags:
        facts = {"run": job.run, "directory": job.directory, "manifests": manifests(job)}
        result(json.dumps(facts, indent=2))
    else:
        result(text(job).rstrip("\n"))
    return 0


def train(line: Line, result: Callable[[str], None]) -> int:
    """Submit the run and follow it to its end."""
    from launcher.clusters.kuberay.kubectl import Kubectl
    from launcher.clusters.kuberay.ray_job import text

    job = _job(line)
    kubectl = Kubectl(job.cluster.context, job.cluster.namespace)
    context = kubectl.check()
    kubectl.create(text(job))
    say(f"{job.run}: RayJob {job.name} on {context}, {job.cluster.nodes} x {job.nodes.size.name}")
    how = f"Follow it with: kubectl --namespace {job.cluster.namespace} logs -f job/{job.name}"
    stop = f"stop it with: launch stop {job.run} run.root={job.root}"
    result(job.directory)
    if job.cluster.detach:
        say(f"{how}; {stop}")
        return 0
    try:
        status = kubectl.follow(job.name, say, say)
    except KeyboardInterrupt:
        say(f"It goes on there. {how}; {stop}")
        return 130
    if status.get("jobStatus") == "SUCCEEDED":
        return 0
    why = str(status.get("message") or status.get("reason") or status.get("jobStatus") or "no reason given").strip()
    raise TrainingError(
        f"The RayJob {job.name} failed: {why.splitlines()[-1].rstrip('.')}. What it printed: kubectl --namespace "
        f"{job.cluster.namespace} logs job/{job.name}; why pods do not come: kubectl describe rayjob {job.name}."
    )


def _job(line: Line) -> RayJob:
    from launcher.clusters.kuberay.ray_job import ray_job
    from launcher.config.schema import default_run_name
    from launcher.jobs.prepare import composed

    request, ask = line.request(), "offline" not in line.flags
    if "multirun" in line.flags:
        from launcher.sweeps.meaning import read_sweep
        from launcher.sweeps.planning import check_values

        meant = read_sweep(request)
        check_values(meant)
        root = str(meant.directory.path.parent)
        return ray_job(meant.cluster, meant.directory.name, root, ["-m", *_words(line)], ask)
    composition = composed(request)
    job = composition.job
    run = job.run.name or default_run_name(composition.choices, datetime.now())
    return ray_job(job.cluster, run, job.run.root, _words(line), ask)


def _words(line: Line) -> list[str]:
    """Return the words for the command on the head: all but those about where it runs."""
    from launcher.config.words import shown
    from launcher.jobs.prepare import key_of

    request = line.request()
    kept = [word for word in request.words if key_of(word).split(".")[0] != "cluster"]
    kept = [word for word in kept if key_of(word) not in ("run.name", "run.root")]
    for word in kept:
        if shown(word) != word:
            raise ConfigError(
                f"{shown(word)} holds a secret, and a manifest is kept by Kubernetes, where others may read it. Say "
                "KEY=${oc.env:NAME} instead, with cluster.env=[NAME] and cluster.secret=SECRET."
            )
    if request.config_dir is None:
        return kept
    if not request.config_dir.is_relative_to(request.calling):
        raise ConfigError(
            f"--config-dir {request.config_dir} lies outside of the calling directory; in the image of cluster.image "
            "the project is the working directory. Name a directory inside of it."
        )
    return ["--config-dir", str(request.config_dir.relative_to(request.calling)), *kept]
