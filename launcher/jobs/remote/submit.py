"""Submits a run or a sweep to a cluster, and follows it."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.clusters import base
from launcher.clusters.pricing import rates
from launcher.clusters.remote import mounts, project
from launcher.clusters.remote.node_setup import NodeSetup
from launcher.clusters.remote.ray_jobs import OVER, Jobs, Unreachable, checked_url, own_token
from launcher.clusters.remote.registry import Head
from launcher.clusters.ssh.lifecycle import copy_directory
from launcher.config.schema import ScalingConfig
from launcher.errors import HostError, LaunchError, RunError, Stopped, WorkerLost, from_dict
from launcher.jobs.prepare import Prepared, Request, key_of
from launcher.jobs.remote import follow, location, packaging
from launcher.jobs.remote.connection import connected, through
from launcher.jobs.remote.copies import Copies, upload
from launcher.jobs.remote.location import RunLocation, location_of
from launcher.jobs.remote.wire import Event
from launcher.runs import user_state
from launcher.runs.storage import disk_uri

DETACH = "detach"


@dataclass(frozen=True)
class RemoteOutcome:
    """The end of a submitted run, or of following it.

    Attributes:
        result: the content of result.json.
        signal_number: the signal that stopped the run, or None.
        detached: the run continues, and the command has stopped following it.
        more: other facts that the driver sent at the end.
    """

    result: dict[str, Any]
    signal_number: int | None = None
    detached: bool = False
    more: dict[str, Any] = field(default_factory=dict)


class Submission:
    """Submits one run or sweep, and follows it.

    Args:
        on_sent: called with the name of the cluster when the job was submitted.
        on_event: called with every event of the run.
        ask: called after Ctrl-C; returns "stop" or "detach".
        trials: for a sweep, the largest number of parallel trials; None for a run.
    """

    def __init__(
        self,
        request: Request,
        prepared: Prepared,
        on_sent: Callable[[str], None],
        on_event: Callable[[Event], None],
        ask: Callable[[], str],
        trials: int | None = None,
    ) -> None:
        self._request, self._prepared, self._on_sent = request, prepared, on_sent
        self._on_event, self._ask, self._trials = on_event, ask, trials
        self._run = prepared.directory
        self._config_dir = str(request.config_dir) if request.config_dir else None
        self._before, self._recorded = location_of(prepared.directory), user_state.lookup(prepared.directory)
        self._submitted = False
        self._begun = False  # the driver has started the run
        self._ended = False  # the driver has reported its end
        self._copies: Copies | None = None
        self._created: list[Path] = []
        self._setup: dict[str, Any] = {}

    def train(self, interrupts: Any) -> RemoteOutcome:
        """Submit the run and follow it to its end.

        Args:
            interrupts: counts signals (`runners.signals.Interrupts`); it is entered already.

        Raises:
            RequestError: the request is invalid; nothing was started.
            LaunchError: the error with which the driver ended.
            Stopped: a second signal was received; the run continues to stop on the cluster.
        """
        cluster = self._prepared.job.cluster
        project.check(self._request.calling)
        values = packaging.environment(cluster.env)
        mounted = mounts.setup_lines(mounts.read(cluster.mounts))
        self._setup = asdict(NodeSetup.of(self._request.calling, [*mounted, *cluster.setup], cluster.env))
        try:
            kind = base.kind_of(cluster)
            if (url := kind.jobs_url(cluster)) is not None:
                return self._on_url(url, values, interrupts)
            with interrupts.at_once():  # the run does not exist yet
                head = kind.provision(cluster, self._note, self._request.calling.absolute(), self._scaling())
            return self._on_head(head, values, interrupts)
        except BaseException as error:
            lost = isinstance(error, WorkerLost) and self._submitted and not self._ended
            rejected = isinstance(error, LaunchError) and not self._begun and not lost
            if rejected and self._before is not None:  # its files are still at the former location
                assert self._recorded is not None
                self._before.write(self._run, cluster=self._recorded.cluster, token=self._recorded.token)
            elif not self._run.exists() and not lost:  # it never started, so its name can be used again
                location.forget(self._run, self._created)
            raise

    def _check_idle(self) -> None:
        """Raise RunError if a driver of the run is still running on its last cluster; local files may be old."""
        before = self._before
        if before is None:
            return
        try:
            with connected(self._run) as jobs:
                status = jobs.status(before.job)
        except (LaunchError, Unreachable):  # a cluster that no longer exists must not block the run
            self._note(f"{before.where}, the last cluster of {self._run.name}, does not answer.")
            return
        if status not in (*OVER, "GONE"):
            name = self._run.name
            raise RunError(
                f'"{name}" is running on {before.where}. Follow it with: launch logs {name}; stop it with: launch stop '
                f"{name}."
            )

    def _on_url(self, address: str, values: dict[str, str], interrupts: Any) -> RemoteOutcome:
        token = own_token()
        jobs = Jobs(checked_url(address), token)
        self._on_event({"kind": "phase", "name": "cluster"})
        self._check_idle()
        found = RunLocation(packaging.new_job(), jobs.url, config_dir=self._config_dir)
        self._record(found, token)
        self._submit(jobs, found, values)
        return self._after_submit(jobs, found, interrupts)

    def _scaling(self) -> ScalingConfig:
        """Return the workers that may run at the same time, for which the cluster needs nodes."""
        scaling = self._prepared.job.scaling
        if self._trials is None or scaling.workers == "auto":
            return scaling
        least = scaling.min_workers or scaling.workers
        return replace(scaling, workers=scaling.workers * self._trials, min_workers=least)

    def _on_head(self, head: Head, values: dict[str, str], interrupts: Any) -> RemoteOutcome:
        """Start the driver on a head that is reached over SSH, and copy the run's files from it."""
        calling, shell = self._request.calling.absolute(), head.shell()
        directory = f"{head.directory}/runs/{Path(copy_directory(calling)).name}"
        root, remote = self._run.root, None
        if self._run.uri is None:
            root, remote = directory, f"{directory}/{self._run.name}"
            if len(head.hosts) != 1:  # the hosts may share no disk
                root = disk_uri(Path(directory))
        found = RunLocation(packaging.new_job(), head=head.name, directory=remote, config_dir=self._config_dir)
        with through(head) as jobs:
            self._check_idle()
            self._record(found)
            if remote is not None and self._prepared.resumes:
                upload(shell, remote, self._run)
            cost = rates.overrides(self._prepared.job.cluster, head.usd_per_hour, len(head.hosts) or 1)
            words = [*self._words(root), *cost]
            self._send(jobs, found, words, values, head)
            if remote is None or self._prepared.job.cluster.detach:
                return self._after_submit(jobs, found, interrupts)
            copies = self._copies = Copies(shell, remote, self._run)
            try:
                outcome = self._after_submit(jobs, found, interrupts)
            except BaseException:
                with contextlib.suppress(HostError):
                    copies.close(last=self._begun)  # a rejected run has no files: the directory may be another run's
                raise
            try:
                copies.close(last=not outcome.detached)
            except HostError as error:
                self._note(f"Some files were not copied. Copy them with `launch logs {self._run.name}`. {error}")
            return replace(outcome, result=self._run.result() or outcome.result) if outcome.result else outcome

    def _send(
        self, jobs: Jobs, found: RunLocation, words: list[str], values: dict[str, str], head: Head | None = None
    ) -> None:
        """Start the driver. If the nodes have no copy of the project, it is sent through Ray Jobs."""
        python = head.python if head is not None else None
        calling, config_dir = self._request.calling.absolute(), self._request.config_dir
        if head is not None and base.named(head.kind).copies_project:
            where = f"{head.directory}/{copy_directory(calling)}"
            config = str(config_dir.relative_to(calling)) if config_dir and config_dir.is_relative_to(calling) else None
            if config_dir is not None and config is None:
                config = f"{where}-config-{hashlib.sha256(str(config_dir).encode()).hexdigest()[:6]}"
                chosen = project.select(config_dir)
                self._note_withheld(chosen.withheld())
                head.shell().send(config_dir, chosen.files, config)
            jobs.put(found.job, self._spec(words, where, config, values))
            jobs.submit(found.job, packaging.entrypoint("-P", "-m", "launcher.driver", found.job, python=python), {})
            return
        with tempfile.TemporaryDirectory(prefix="launch-package-") as folder:
            packed = packaging.pack(calling, config_dir, Path(folder))
            self._note(f"Sending {packed.what}.")
            self._note_withheld(packed.withheld)
            jobs.put(found.job, self._spec(words, None, packed.config_dir, values))
            workdir = str(Path(folder) / "calling")
            if head is not None:  # VMs of an autoscaled cluster copy launch from the head
                driver = packaging.entrypoint("-P", "-m", "launcher.driver", found.job, python=python)
                jobs.submit(found.job, driver, {"PYTHONPATH": f"{head.directory}/launch"}, working_dir=workdir)
                return
            driver = packaging.entrypoint(*packaging.with_own("launcher.driver"), found.job)
            jobs.submit(found.job, driver, {}, [Path(folder) / packaging.OWN], working_dir=workdir)

    def _spec(self, words: list[str], calling: str | None, config_dir: str | None, values: dict[str, str]) -> bytes:
        cluster = asdict(self._prepared.job.cluster)
        more = {"setup": self._setup, "sweep": self._trials is not None, "cluster": cluster}
        return packaging.job_spec(words, calling, config_dir, values, **more)

    def _note(self, text: str) -> None:
        self._on_event({"kind": "note", "text": text})

    def _note_withheld(self, text: str) -> None:
        if text:
            self._note(text)

    def _record(self, found: RunLocation, token: str | None = None) -> None:
        """Write the location of the run to its directory and to this user's records."""
        self._created = [path for path in (self._run.path, *self._run.path.parents) if not path.exists()]
        self._run.create()
        cluster, known = asdict(self._prepared.job.cluster), token and user_state.fingerprint(token)
        found.write(self._run, cluster=cluster, token=known)

    def _after_submit(self, jobs: Jobs, found: RunLocation, interrupts: Any) -> RemoteOutcome:
        self._submitted = True
        self._on_sent(found.where)
        if self._prepared.job.cluster.detach:
            return RemoteOutcome({}, detached=True)
        return self._follow(jobs, found, interrupts)

    def _words(self, root: str) -> list[str]:
        replaced = ("run.name", "run.root")
        words = [word for word in self._request.words if key_of(word) not in replaced]
        return [*words, f"run.name={_quoted(self._run.name)}", f"run.root={_quoted(root)}"]

    def _submit(self, jobs: Jobs, found: RunLocation, values: dict[str, str]) -> None:
        """Compare the cluster with this process, send it the files that it lacks, and start the driver."""
        calling, config_dir = self._request.calling.absolute(), self._request.config_dir
        on_store = self._run.uri is not None
        facts = packaging.probe(jobs, None if on_store else self._run.path, calling)
        if not on_store and not facts.sees_root:
            raise RunError(
                f"The head of the cluster at {jobs.url} does not see {self._run.root}, so this machine would not get "
                "the run's files. Mount a shared directory under the same path on both sides and set run.root to it, "
                "or use an object store (run.root=abfss://…, see docs/storage.md)."
            )
        driver = packaging.entrypoint("-P", "-m", "launcher.driver", found.job)
        words = self._words(self._run.root)
        if facts.sees_calling and facts.same_project:
            where = str(config_dir) if config_dir else None
            jobs.put(found.job, self._spec(words, str(calling), where, values))
            jobs.submit(found.job, driver, {"PYTHONPATH": str(project.HOME)})
            return
        self._send(jobs, found, words, values)

    def _follow(self, jobs: Jobs, found: RunLocation, interrupts: Any) -> RemoteOutcome:
        handled = 0

        def poll() -> None:
            nonlocal handled
            if interrupts.count == handled:
                return
            first, handled = handled == 0, interrupts.count
            if not first:
                raise Stopped(interrupts.signal_number)
            if interrupts.signal_number == signal.SIGINT and self._ask() == DETACH:
                raise _Detached
            handled = interrupts.count  # ignore another Ctrl-C during the question
            self._note(f"Stopping: {'the trials save' if self._trials else 'the run saves'} a checkpoint first.")
            with contextlib.suppress(Unreachable):
                jobs.stop(found.job)

        try:
            for event in follow.events(jobs, found.job, found.where, poll, self._run.name):
                if event["kind"] == "end":
                    return self._outcome(event, interrupts)
                if event["kind"] == "begun":
                    self._begun = True
                    if self._copies is not None:
                        self._copies.start()
                self._on_event(event)
        except _Detached:
            return RemoteOutcome({}, detached=True)
        raise AssertionError

    def _outcome(self, end: Event, interrupts: Any) -> RemoteOutcome:
        self._ended = True
        if error := end.get("error"):
            raise from_dict(error)
        if "stopped" in end:
            raise Stopped(interrupts.signal_number or end["stopped"])
        return RemoteOutcome(end["result"], interrupts.signal_number, more=end.get("more", {}))


def _quoted(value: str) -> str:
    """Return a value in quotes, as Hydra parses it in an override."""
    return '"' + value.replace('"', '\\"') + '"'


class _Detached(Exception):
    pass
