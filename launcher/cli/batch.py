"""Jobs for a scheduler such as Kubernetes: `plan` prints the manifest, `train` submits it and follows the job."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime

from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.cli.requests import request_of
from launcher.clusters.base import Batch, ClusterKind, WaitingRun, kind_of, kinds
from launcher.config.cluster_kinds import find
from launcher.config.overrides import masked
from launcher.config.schema import default_run_name
from launcher.config.settings import user_settings
from launcher.errors import ConfigError
from launcher.jobs.prepare import composed, key_of, prepare, run_section
from launcher.runs import RunDirectory
from launcher.runs.storage import is_gathered, is_uri


def uses_scheduler(line: Line) -> bool:
    """Return whether the cluster of a command line is of a kind that submits jobs to a scheduler.

    The last word about the cluster decides, then the user's own settings.
    """
    kind = _kind_of(line)
    return kind is not None and kind.is_batch


def waiting(run: RunDirectory) -> WaitingRun | None:
    """Return a run that waits in a scheduler of any kind; None if it does not wait."""
    found = (kind.waiting(run) for kind in kinds())
    return next((each for each in found if each is not None), None)


def _kind_of(line: Line) -> ClusterKind | None:
    pairs = [word.partition("=") for word in line.words]
    chosen = [value for key, _, value in pairs if key in ("cluster", "cluster.kind")]
    kind: ClusterKind | None = find((chosen[-1] if chosen else user_settings().choice) or "")
    return kind


def plan(line: Line, result: Callable[[str], None]) -> int:
    """Print the manifest that `train` would submit."""
    run, batch = _batch(line)
    if "json" in line.flags:
        result(json.dumps({"run": run, "directory": batch.directory, **batch.facts()}, indent=2))
    else:
        result(batch.text().rstrip("\n"))
    return 0


def train(line: Line, result: Callable[[str], None]) -> int:
    """Submit the job, follow it to its end, and return its exit status."""
    _, batch = _batch(line)
    follow = batch.submit(say)
    result(batch.directory)
    return follow()


def _batch(line: Line) -> tuple[str, Batch]:
    """Return the name of the run or the sweep, and its batch job."""
    request, ask, kind = request_of(line), "offline" not in line.flags, _kind_of(line)
    shares_files = kind is not None and kind.shares_files
    if "multirun" in line.flags:
        from launcher.sweeps.planning import check_trials  # imports Optuna
        from launcher.sweeps.specification import read_sweep

        if not shares_files:
            _check_root_of_sweep(run_section(request).root)
        spec = read_sweep(request)
        check_trials(spec)
        cluster, run, root = spec.cluster, spec.directory.name, spec.directory.root
        words = ["-m", *_words_for_head(line, shares_files)]
    elif shares_files:
        prepared = prepare(request)
        cluster, words = prepared.job.cluster, _words_for_head(line, shares_files)
        run, root = prepared.directory.name, prepared.directory.root
    else:
        composition = composed(request)
        job = composition.job
        cluster, root, words = job.cluster, job.run.root, _words_for_head(line, shares_files)
        run = job.run.name or default_run_name(composition.choices, datetime.now())
    return run, kind_of(cluster).batch(cluster, run, root, words, ask)


def _check_root_of_sweep(root: str) -> None:
    """Raise ConfigError if the root is an object store, which this machine may not be able to read."""
    if is_uri(root) and not is_gathered(root):
        raise ConfigError(
            f"run.root={root} is an object store, but here a sweep keeps its study in a directory. Use the path of a "
            "volume that all pods share, with cluster.mounts={PATH: claim://NAME}.",
            key="run.root",
        )


def _words_for_head(line: Line, shares_files: bool = False) -> list[str]:
    """Return the words of the command that the head of the cluster runs: all except those about its location.

    Raises:
        ConfigError: a word contains a secret, or the configuration directory is not part of the image.
    """
    request = request_of(line)
    words = [word for word in request.words if key_of(word).split(".")[0] != "cluster"]
    words = [word for word in words if key_of(word) not in ("run.name", "run.root")]
    for word in words:
        if masked(word) != word:
            raise ConfigError(
                f"{masked(word)} contains a secret, and a scheduler stores jobs where others may read them. Write "
                "KEY=${oc.env:NAME} instead, with cluster.env=[NAME], and on Kubernetes cluster.secret=SECRET."
            )
    if request.config_dir is None:
        return words
    if shares_files:
        return ["--config-dir", str(request.config_dir.absolute()), *words]
    if not request.config_dir.is_relative_to(request.calling):
        raise ConfigError(
            f"--config-dir {request.config_dir} is outside of the calling directory, which is the working directory in "
            "the image of cluster.image. Choose a directory inside of it.",
            key="--config-dir",
        )
    return ["--config-dir", str(request.config_dir.relative_to(request.calling)), *words]
