"""What a sweep leaves on disk beside its journal: trials.csv, best.yaml, log.txt, its own result.json."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import masking
from launcher.runs import RunDirectory
from launcher.runs.plain_files import open_file, replace_text
from launcher.sweeps.search import display_values
from launcher.sweeps.syntax import plain_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from launcher.sweeps.study import Study

COLUMNS = ("number", "state", "objective", "seconds", "error")


def rows(study: Study, interrupted: frozenset[int] = frozenset()) -> list[dict[str, Any]]:
    """Return one mapping a trial: the columns of trials.csv, then the swept keys.

    `objective` is a number, a list of numbers where there are several objectives, or None. interrupted: trials that are
    under way for Optuna, and that nobody works on.
    """
    from launcher.sweeps.study import STATES

    found = []
    for trial in study.frozen():
        state = "stopped" if trial.number in interrupted else STATES[trial.state]
        found.append(
            {
                "number": trial.number,
                "state": state,
                "objective": objective(trial),
                "seconds": trial.user_attrs.get("seconds"),
                "error": trial.user_attrs.get("error"),
                **display_values(study.values(trial), study.space),
            }
        )
    return found


def objective(trial: FrozenTrial) -> float | list[float] | None:
    """Return what a trial has reached: of a pruned one, its last evaluation."""
    if trial.values:
        return trial.values[0] if len(trial.values) == 1 else list(trial.values)
    if trial.intermediate_values:
        return trial.intermediate_values[max(trial.intermediate_values)]
    return None


def best(study: Study) -> dict[str, Any] | None:
    """Return the best trial: number, what it has reached, words and parameters; None where none is completed."""
    found = study.best()
    if found is None:
        return None
    values = study.values(found)
    return {
        "number": found.number,
        "objective": objective(found),
        "overrides": study.space.overrides(values),
        "parameters": display_values(values, study.space),
    }


def write_csv(path: Path, found: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Write trials.csv: a reader sees the old or the new one. Several objectives are separated by semicolons."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *keys], restval="", lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({key: cell(value) for key, value in row.items()})
    _replace(path, text.getvalue())


def cell(value: Any) -> str:
    if isinstance(value, list):
        return ";".join(str(each) for each in value)
    return "" if value is None else plain_text(value)


def write_best(directory: RunDirectory, study: Study) -> FrozenTrial | None:
    """Write best.yaml: the best trial, what it has reached, and the words that make it."""
    best = study.best()
    if best is None:
        return None
    values = {objective.tag: value for objective, value in zip(study.objectives, best.values, strict=True)}
    lines = [
        f"# The best trial so far. Train it further: launch run.like={directory.name}/best trainer.epochs=50",
        f"number: {best.number}",
        f"objective: {json.dumps(values)}",
        "overrides:",
        *(f"- {json.dumps(word)}" for word in study.space.overrides(study.values(best))),
    ]
    if len(study.objectives) > 1:
        lines.append(
            f"front: {json.dumps([trial.number for trial in study.front()])} # the trials that none beats in all"
        )
    _replace(directory.path / "best.yaml", "\n".join(lines) + "\n")
    return best


def delete_checkpoints(directory: RunDirectory, study: Study, ended: Sequence[int]) -> None:
    """Remove the checkpoints of the trials that have ended and are not the best (`sweep.keep=best`)."""
    kept = {trial.number for trial in study.front()}
    for number in ended:
        run = RunDirectory(directory.path / str(number))
        if number not in kept and run.checkpoints.is_dir():
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            run.update_result(checkpoint=None)


def evaluated_at(run: RunDirectory, tag: str) -> list[int]:
    """Return the steps at which a trial that is continued was evaluated before."""
    steps = []
    with suppress(OSError):
        for line in run.metrics.read_text().splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if tag in entry:
                    steps.append(int(entry["step"]))
    return steps


class SweepLog:
    """The sweep's log.txt: one line for whatever happens to a trial."""

    def __init__(self, path: Path) -> None:
        self._file = open_file(path, "a")
        self._hide = masking.hider()

    def line(self, text: str) -> None:
        with suppress(OSError):  # a full disk is told where it matters
            self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {self._hide(text)}\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _replace(path: Path, text: str) -> None:
    replace_text(path, text)
