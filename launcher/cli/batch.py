"""Runs and sweeps that are handed to a scheduler as a whole: `plan` prints the request, `train` submits and follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from launcher.cli.output import say
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.cli.line import Line
    from launcher.clusters.base import Batch


def is_meant(line: Line) -> bool:
    """Whether the last word about the cluster, or the user's own settings, choose a kind that uses a scheduler."""
    from launcher.config.cluster_kinds import find
    from launcher.config.settings import user_settings

    pairs = [word.partition("=") for word in line.words]
    chosen = [value for key, _, value in pairs if key in ("cluster", "cluster.kind")]
    kind = find((chosen[-1] if chosen else user_settings().choice) or "")
    return kind is not None and kind.is_batch


def plan(line: Line, result: Callable[[str], None]) -> int:
    """Print what the scheduler is given, as `train` would give it."""
    run, batch = _batch(line)
    if "json" in line.flags:
        result(json.dumps({"run": run, "directory": batch.directory, **batch.facts()}, indent=2))
    else:
        result(batch.text().rstrip("\n"))
    return 0


def train(line: Line, result: Callable[[str], None]) -> int:
    """Submit the run and follow it to its end."""
    _, batch = _batch(line)
    follow = batch.submit(say)
    result(batch.directory)
    return follow()


def _batch(line: Line) -> tuple[str, Batch]:
    from launcher.clusters.base import kind_of
    from launcher.config.schema import default_run_name
    from launcher.jobs.prepare import composed

    request, ask = line.request(), "offline" not in line.flags
    if "multirun" in line.flags:
        from launcher.sweeps.planning import check_trials
        from launcher.sweeps.specification import read_sweep

        spec = read_sweep(request)
        check_trials(spec)
        cluster, run, root = spec.cluster, spec.directory.name, str(spec.directory.path.parent)
        words = ["-m", *_words(line)]
    else:
        composition = composed(request)
        job = composition.job
        cluster, root, words = job.cluster, job.run.root, _words(line)
        run = job.run.name or default_run_name(composition.choices, datetime.now())
    return run, kind_of(cluster).batch(cluster, run, root, words, ask)


def _words(line: Line) -> list[str]:
    """Return the words for the command on the head: all but those about where it runs."""
    from launcher.config.overrides import masked
    from launcher.jobs.prepare import key_of

    request = line.request()
    kept = [word for word in request.words if key_of(word).split(".")[0] != "cluster"]
    kept = [word for word in kept if key_of(word) not in ("run.name", "run.root")]
    for word in kept:
        if masked(word) != word:
            raise ConfigError(
                f"{masked(word)} holds a secret, and a manifest is kept by Kubernetes, where others may read it. Say "
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
