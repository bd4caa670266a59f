"""Files of a sweep besides its journal: trials.csv, best.yaml and log.txt."""

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
from launcher.sweeps import stored
from launcher.sweeps.search import display_values
from launcher.sweeps.space import SearchSpace, plain_text
from launcher.sweeps.study import STATES, Study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def columns(space: SearchSpace) -> list[str]:
    """Return the columns of trials.csv."""
    summary = ["mean", "spread"] if space.over else []
    return ["number", "state", "objective", *summary, "seconds", "error", *space.keys]


class Table:
    """The table of the trials of a study. The rows of ended trials are computed once."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._ended: dict[int, dict[str, Any]] = {}

    def rows(self, interrupted: frozenset[int] = frozenset(), waiting: int | None = None) -> list[dict[str, Any]]:
        """Return one mapping for each trial, with the columns of trials.csv.

        `objective` is a number, a list of numbers for several objectives, or None. `mean` and `spread` are those of the
        completed repeats of the trial so far (see `repeats`), or None.

        Args:
            interrupted: trials that are running according to the journal, but that no worker runs.
            waiting: a trial that is running according to the journal, but waits for workers.
        """
        repeats = self._study.repeats()
        found = []
        for trial in self._study.frozen():
            row = self._ended.get(trial.number) or _row(self._study, trial)
            if trial.state.is_finished():
                self._ended[trial.number] = row
            elif trial.number in interrupted or trial.number == waiting:
                row["state"] = "stopped" if trial.number in interrupted else "waiting"
            if self._study.space.over:
                own = repeats[trial.number]
                row |= {"mean": own.mean if own.objectives else None, "spread": own.spread}
            found.append(dict(row))
        return found


def rows(study: Study) -> list[dict[str, Any]]:
    """Return the table of a study (see `Table.rows`)."""
    return Table(study).rows()


def _row(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    summary: dict[str, Any] = {"mean": None, "spread": None} if study.space.over else {}
    facts = {"seconds": trial.user_attrs.get("seconds"), "error": trial.user_attrs.get("error")}
    row = {"number": trial.number, "state": STATES[trial.state], "objective": objective(trial), **summary, **facts}
    return {**row, **display_values(study.values(trial), study.space)}


def objective(trial: FrozenTrial) -> float | list[float] | None:
    """Return the objective of a trial; of a pruned one, its last evaluation."""
    if trial.values:
        return trial.values[0] if len(trial.values) == 1 else list(trial.values)
    if trial.intermediate_values:
        return trial.intermediate_values[max(trial.intermediate_values)]
    return None


def best(study: Study) -> dict[str, Any] | None:
    """Return number, objective, overrides and parameters of the best trial, or None if no trial is completed.

    With repeats also `mean`, `spread` and `repeats` (their number).
    """
    found = study.best()
    if found is None:
        return None
    values, repeats = study.values(found), study.repeats_of(found.number)
    return {
        "number": found.number,
        "objective": objective(found),
        **(repeats.to_dict() if repeats is not None else {}),
        "overrides": study.space.overrides(values),
        "parameters": display_values(values, study.space),
    }


def write_csv(path: Path, found: Sequence[Mapping[str, Any]], space: SearchSpace) -> None:
    """Write trials.csv atomically. Several objectives are separated by semicolons."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(space), restval="", lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({key: cell(value) for key, value in row.items()})
    replace_text(path, text.getvalue())


def cell(value: Any) -> str:
    """Return a value as text for trials.csv and report.html."""
    if isinstance(value, list):
        return ";".join(str(each) for each in value)
    return "" if value is None else plain_text(value)


def write_best(directory: RunDirectory, study: Study) -> None:
    """Write best.yaml: number, objective and overrides of the best trial, if a trial is completed."""
    best = study.best()
    if best is None:
        return
    values = {objective.tag: value for objective, value in zip(study.objectives, best.values, strict=True)}
    repeats = study.repeats_of(best.number)
    lines = [
        f"# The best trial so far. Train it further: launch run.like={directory.name}/best trainer.epochs=50",
        f"number: {best.number}",
        f"objective: {json.dumps(values)}",
        *(f"{key}: {json.dumps(value)}" for key, value in (repeats.to_dict() if repeats else {}).items()),
        "overrides:",
        *(f"- {json.dumps(word)}" for word in study.space.overrides(study.values(best))),
    ]
    if len(study.objectives) > 1:
        lines.append(f"front: {json.dumps([trial.number for trial in study.front()])} # the Pareto-optimal trials")
    replace_text(directory.path / "best.yaml", "\n".join(lines) + "\n")


def delete_checkpoints(directory: RunDirectory, study: Study, ended: Sequence[int]) -> None:
    """Delete the checkpoints of the ended trials that are not the best (`sweep.keep=best`)."""
    front = {trial.number for trial in study.front()}
    for number in ended:
        run = RunDirectory(directory.path / str(number))
        if number not in front and run.checkpoints.is_dir():
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            stored.delete_checkpoints(run)
            run.update_result(checkpoint=None)
            stored.push_trial(run)


def evaluated_at(run: RunDirectory, tag: str) -> list[int]:
    """Return the steps at which a resumed trial was evaluated before."""
    steps = []
    with suppress(OSError):
        for line in run.metrics.read_text().splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if tag in entry:
                    steps.append(int(entry["step"]))
    return steps


class SweepLog:
    """The log.txt of a sweep, with one line for each event of a trial."""

    def __init__(self, path: Path) -> None:
        self._file = open_file(path, "a")
        self._hide = masking.hider()

    def line(self, text: str) -> None:
        with suppress(OSError):  # writes of result.json report a full disk
            self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {self._hide(text)}\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()
