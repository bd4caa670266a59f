"""Finds the weights that `checkpoint.load` names: the best checkpoint of a run or sweep, or a file."""

from __future__ import annotations

from pathlib import Path

from launcher import runs
from launcher.config import Job
from launcher.engine.checkpoint import available, newest_intact, verify
from launcher.errors import RequestError, RunError, did_you_mean
from launcher.jobs.prepare import where_others_are
from launcher.runs import RunDirectory
from launcher.runs.storage import disk_uri, is_gathered


def weights_of(job: Job, root: str | None = None) -> str | None:
    """Return the path or URI of the weights that `checkpoint.load` names; None if it names none.

    Args:
        root: the run root in which runs are found; None: the job's own.

    Raises:
        RunError: there is no such run or file, or the run has no usable checkpoint.
    """
    source, root = job.checkpoint.load, root or job.run.root
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.is_file() or (path / "state.json").is_file():
        return str(path.absolute())
    others = where_others_are(root)
    try:
        run = runs.find(others, source)
    except RequestError:
        pass
    else:
        found = best_checkpoint(run)
        return disk_uri(found) if is_gathered(root) else run.display_path(found)
    known = [other.name for other in runs.list_runs(others)]
    raise RunError(
        f"checkpoint.load={source} is neither a run in {others} nor a file.{did_you_mean(source, known)} Use the name "
        "of a run, SWEEP/best, or the path of a file."
    )


def best_checkpoint(run: RunDirectory) -> Path:
    """Return the checkpoint with the best monitored value, or the newest intact one if no value is monitored.

    Raises:
        RunError: the run has no usable checkpoint.
    """
    best = run.result().get("best") or {}
    if run.uri is not None:
        from launcher.engine.checkpoint.uploads import fetch

        found = fetch(run, best.get("step"))
        if found is not None:
            return found
    path = available(run.checkpoints).get(best.get("step", -1))
    if path is not None:
        verify(path)
        return path
    newest = newest_intact(run.checkpoints)
    if newest.path is None:
        raise RunError(f'The run "{run.name}" has no usable checkpoint. {newest.explain()}'.strip())
    return newest.path
