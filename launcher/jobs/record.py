"""Writes a run's directory on the driver's side: the files before the start, and how the run ended.

Rank 0 writes the files during the run (`engine.record`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import money, runs
from launcher.config.calling_directory import shared_path
from launcher.engine.checkpoint import newest_intact
from launcher.errors import RequestError, RunError, Stopped, StorageError
from launcher.formatting import size
from launcher.jobs.prepare import Prepared, Request, prepare
from launcher.jobs.weights import weights_of
from launcher.money import Bill, Rate
from launcher.planning.plan import Plan
from launcher.runs import RunDirectory, provenance
from launcher.runs.mirror import Mirrored
from launcher.runs.plain_files import read_text
from launcher.startup_timing import Marks

if TYPE_CHECKING:
    from launcher.engine.entry import Task

_EMPTY_RESULT: dict[str, Any] = {
    "status": "running",
    "reason": None,
    "error": None,
    "steps": 0,
    "epochs": 0.0,
    "samples": 0,
    "workers": None,
    "world_sizes": [],
    "restarts": 0,
    "preemptions": 0,
    "lost_steps": 0,
    "seconds": 0.0,
    "seconds_to_first_step": None,
    "phases": None,
    "samples_per_second": None,
    "cost_usd": None,
    "checkpoint": None,
    "metrics": {},
    "best": None,
}


@dataclass(frozen=True)
class Origin:
    """The provenance of a run: the facts for result.json, and the uncommitted changes of the calling repository."""

    facts: dict[str, Any]
    patch: str

    @classmethod
    def of(cls, calling: Path) -> Origin:
        facts = {"user": provenance.user(), "versions": provenance.versions(), "git": provenance.git(calling)}
        return cls(facts, provenance.patch(calling))


class Record:
    """Writes a run's directory. Used as a context manager, it records every failure in result.json."""

    def __init__(self, request: Request, prepared: Prepared | None = None, origin: Origin | None = None) -> None:
        self._request = request
        self._prepared = prepared
        self._claims = prepared is None  # only the driver of its sweep starts a trial
        self._origin = origin
        self._begun = False
        self.marks = Marks([("configuration", request.started)])
        self._made_root = False
        self._bill = Bill()
        self._mirrored = None if prepared is None else Mirrored.of(prepared.directory)
        self._weights: str | None = None

    def __enter__(self) -> Record:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._begun:
            # A full or missing disk must not hide the error that it caused.
            with suppress(OSError, RunError, StorageError):
                self.failed(error)

    def prepare(self) -> Prepared:
        self._prepared = prepare(self._request)
        self._mirrored = Mirrored.of(self._prepared.directory)
        if self._mirrored is not None and self._prepared.resumes:
            self._mirrored.pull()
        return self._prepared

    def begin(self, plan: Plan | None, rate: Rate | None = None, root: str | None = None) -> Task:
        """Write the files that a run has before it starts, and return its task for the workers.

        Args:
            plan: the plan of the run; the disk must have space for a checkpoint of it.
            rate: the price of the machines, if there is no plan.
            root: the run root in which `checkpoint.load` finds runs; None: the job's own.

        Raises:
            RunError: the directory cannot be written, was created by another command at the same time, or has no space
                for a checkpoint; the budget of a resumed run is spent, or another process is running it.
        """
        from launcher.engine.entry import Task

        assert self._prepared is not None
        prepared, directory = self._prepared, self._prepared.directory
        weights = self.weights(root)
        rate = plan.rate if plan is not None else rate
        earlier = directory.result() if prepared.resumes else {}
        check_budget(directory, earlier, rate)
        self._bill = Bill(float(earlier.get("seconds") or 0.0), rate)
        self._made_root = not directory.path.parent.exists()
        try:
            directory.create()
            if plan is not None:
                _check_space(directory, plan)
            self._write(prepared)
            if self._mirrored is not None:
                self._mirrored.publish()
        except FileExistsError as error:
            raise RunError(
                f'The run "{directory.name}" was started by another command at the same time. Choose another run.name.'
            ) from error
        except (OSError, RunError) as error:
            self._remove(directory)
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"The run directory {directory.path} cannot be written: {error.strerror or error}. "
                "Choose another directory with run.root=DIRECTORY."
            ) from error
        return Task(
            action="train",
            job=replace(prepared.job, run=replace(prepared.job.run, name=directory.name)),
            directory=directory.display_path(),
            python_path=[shared_path(self._request.calling)],
            started=self._request.started,
            weights=weights,
            marks=self.marks,
            bill=self._bill,
            notes=() if plan is None else plan.notes,
        )

    def weights(self, root: str | None = None) -> str | None:
        """Return the path or URI of the initial weights; None if there are none, or if the run resumes a checkpoint.

        Args:
            root: the run root in which runs are found; None: the job's own.

        Raises:
            RunError: `checkpoint.load` names neither a run nor a file.
        """
        assert self._prepared is not None
        if self._weights is None and self._starts_at_zero():
            self._weights = weights_of(self._prepared.job, root)
        return self._weights

    def _starts_at_zero(self) -> bool:
        """Return whether the run starts at step 0: a new run, or a resumed run without a checkpoint."""
        assert self._prepared is not None
        prepared = self._prepared
        if prepared.job.checkpoint.load is None or not prepared.resumes:
            return True
        return _newest_checkpoint(prepared.directory, self._mirrored) is None

    def _write(self, prepared: Prepared) -> None:
        directory, composition = prepared.directory, prepared.composition
        # The file claims the name of a new run: of two commands at the same time, one fails here.
        if not prepared.resumes:
            directory.config.touch(exist_ok=False)
        elif self._claims and self._mirrored is None:  # a local copy of a run on an object store cannot be claimed
            directory.claim()
        self._begun = True
        if self._request.on_head is None:
            (directory.path / runs.REMOTE).unlink(missing_ok=True)  # this process drives it now
            if self._claims:  # the driver of a sweep records the cluster of its trials
                runs.user_state.record_cluster(directory, asdict(prepared.job.cluster))
        runs.write_text(directory.config, composition.to_yaml(directory.name))
        directory.clear_requests()
        _write_words(directory, composition.masked_words(), append=prepared.resumes)
        origin = self._origin or Origin.of(self._request.calling)
        runs.write_text(directory.path / "code.patch", origin.patch)
        facts = origin.facts
        if prepared.resumes:
            earlier = {**_EMPTY_RESULT, **directory.result()}
            directory.write_result({**earlier, **facts, "status": "running", "reason": None, "error": None})
        else:
            directory.write_result({**_EMPTY_RESULT, **facts})
        directory.beat()

    def _remove(self, directory: RunDirectory) -> None:
        """Remove the files of a run that could not start. Files that existed before are kept."""
        assert self._prepared is not None
        if self._begun and not self._prepared.resumes:
            if self._mirrored is not None:
                with suppress(StorageError):
                    self._mirrored.remove()
            shutil.rmtree(directory.path, ignore_errors=True)
        self._begun = False
        with suppress(OSError):
            directory.path.rmdir()
        if self._made_root:
            with suppress(OSError):
                directory.path.parent.rmdir()

    def failed(self, error: BaseException, keep: bool = False) -> None:
        """Write the end of a failed or stopped run to result.json.

        Args:
            keep: keep the directory even if the request was rejected before training (for a trial of a sweep).
        """
        assert self._prepared is not None
        directory = self._prepared.directory
        if self._mirrored is not None:
            with suppress(StorageError):
                self._mirrored.pull()
        checkpoint = _newest_checkpoint(directory, self._mirrored)
        rejected = isinstance(error, RequestError) and error.exit_status == 2 and checkpoint is None
        if rejected and not keep and not self._prepared.resumes:
            self._remove(directory)  # nothing was trained, so the name can be used again
            return
        seconds = round(self._bill.seconds + time.time() - self._request.started, 3)
        usd = self._bill.spent(directory.result(), seconds)
        changes: dict[str, Any] = {"seconds": seconds, "cost_usd": usd, "checkpoint": checkpoint}
        if isinstance(error, (Stopped, KeyboardInterrupt)):
            directory.update_result(status="stopped", reason="signal", error=None, **changes)
        else:
            directory.update_result(status="failed", reason=None, error=f"{type(error).__name__}: {error}", **changes)
        self.ended(written=True)

    def ended(self, written: bool = False) -> None:
        """Upload the final files of a run on an object store, unless rank 0 has done so on another machine.

        Args:
            written: this process has written result.json, so it is uploaded in any case.
        """
        if self._mirrored is not None:
            with suppress(StorageError):
                if written or not self._mirrored.pull():
                    self._mirrored.push_end()


def _newest_checkpoint(directory: RunDirectory, mirrored: Mirrored | None) -> str | None:
    if mirrored is not None:
        with suppress(StorageError):
            return mirrored.newest_checkpoint()
    newest = newest_intact(directory.checkpoints).path
    return None if newest is None else directory.display_path(newest)


def _check_space(directory: RunDirectory, plan: Plan) -> None:
    """Raise RunError if the disk has no space for one checkpoint."""
    needed = plan.memory["parameters"] + plan.memory["optimizer"]
    free = shutil.disk_usage(directory.path).free
    if free < needed:
        raise RunError(
            f"A checkpoint of this model needs {size(needed)}, but {directory.path.parent} has only {size(free)} free. "
            "Free space, or choose another directory with run.root=DIRECTORY."
        )


def check_budget(directory: RunDirectory, result: dict[str, Any], rate: Rate | None) -> None:
    """Raise RunError if a run that is to be resumed has spent its budget."""
    spent = result.get("cost_usd") or 0.0
    if rate is not None and rate.budget is not None and spent >= rate.budget:
        raise RunError(f"run.resume: {money.budget_refusal(directory.name, spent, rate)}")


def _write_words(directory: RunDirectory, words: Sequence[str], append: bool) -> None:
    """Write the list of overrides to overrides.yaml. A resume appends its overrides."""
    lines = "".join(f"- {json.dumps(word)}\n" for word in words)
    before = read_text(directory.overrides) if append and directory.overrides.exists() else ""
    runs.write_text(directory.overrides, (before if before.strip() != "[]" else "") + lines or "[]\n")
