"""`launch rm NAME`: removes a run or a sweep with its files, unless a process or a cluster works on it."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from launcher import runs
from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.cli.runs import run_root
from launcher.errors import ConfigError, RunError, StorageError
from launcher.formatting import size
from launcher.jobs.remote.states import LOST, state_of
from launcher.runs import FINAL, SENT, RunDirectory, list_runs, user_state
from launcher.runs.mirror import Mirrored


def rm(line: Line) -> int:
    """Run `launch rm`: remove a run, and print what was removed to standard error."""
    assert line.name is not None
    if "/" in line.name:
        sweep = line.name.partition("/")[0]
        raise ConfigError(
            f"{line.name} is a trial of the sweep {sweep}, which needs all of its trials. Remove the whole sweep: "
            f"launch rm {sweep}."
        )
    run = runs.find(run_root(line), line.name)
    place = run.display_path()
    freed = remove(run)
    say(f"Removed {place} ({size(freed)}).")
    return 0


def remove(run: RunDirectory) -> int:
    """Remove a run or a sweep from its run root, and return the bytes that its files occupied.

    The directory is renamed first, so that no command can resume a run that is partly removed.

    Raises:
        RunError: the run, or a trial of the sweep, is active, or may be active on a cluster that does not respond; or
            its files cannot be removed.
    """
    _require_inactive(run)
    hidden = run.path.with_name(f".removed-{secrets.token_hex(4)}")
    try:
        os.rename(run.path, hidden)
        try:
            _require_inactive(RunDirectory(hidden), run.name)  # a command may have resumed it in the meantime
        except RunError:
            os.rename(hidden, run.path)
            raise
        freed = sum(path.lstat().st_size for path in hidden.rglob("*") if not path.is_dir())
        if (mirrored := Mirrored.of(run)) is not None:
            mirrored.remove()
        user_state.forget(run)
        shutil.rmtree(hidden)
    except StorageError as error:
        os.rename(hidden, run.path)
        raise RunError(f'The run "{run.name}" cannot be removed: {error}') from error
    except OSError as error:
        place: Path | str = error.filename or run.path
        raise RunError(f'The run "{run.name}" cannot be removed: {place}: {error.strerror}.') from error
    return freed


def _require_inactive(run: RunDirectory, name: str = "") -> None:
    """Raise RunError if a process or a cluster works on a run, or on a trial of a sweep."""
    name = name or run.name
    for each in (run, *list_runs(run.path)):
        try:
            status = each.status()
        except RunError:  # a damaged result.json: only the heartbeat remains
            status = "running" if each.is_alive() else "unreadable"
        if status == "running":
            trial = "" if each is run else f" (trial {each.name})"
            raise RunError(f'The run "{name}" is running{trial}. Stop it first: launch stop {name}.')
        if status == SENT and each is run:
            state = state_of(run)
            if state is None or state.word not in (*FINAL, LOST):
                word = "in an unknown state" if state is None else state.word
                raise RunError(
                    f'The run "{name}" was sent to a cluster, where it is {word}. Stop it first: launch stop {name}.'
                )
