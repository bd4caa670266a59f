"""Sending a run to a cluster and following it from here."""

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
from launcher.jobs.remote.copies import Copies, bring
from launcher.jobs.remote.location import RunLocation, location_of
from launcher.jobs.remote.wire import Event
from launcher.runs import user_state
from launcher.runs.storage import disk_uri

DETACH = "detach"


@dataclass(frozen=True)
class RemoteOutcome:
    """How a run that was sent away has ended, or that nobody follows it any more (`detached`).

    more: what else its driver tells of the end.
    """

    result: dict[str, Any]
    signal_number: int | None = None
    detached: bool = False
    more: dict[str, Any] = field(default_factory=dict)


class Submission:
    """One run on a cluster, from this end.

    Args:
        on_sent: called with the name of the cluster once the run is on its way.
        on_event: gets every event of the run.
        ask: called once Ctrl-C came: "stop" or "detach".
        trials: the words are those of a sweep, with so many trials at a time at most.
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
        self._begun = False  # the driver there has the run in hand
        self._ended_there = False
        self._copies: Copies | None = None
        self._made: list[Path] = []
        self._needs: dict[str, Any] = {}

    def train(self, interrupts: Any) -> RemoteOutcome:
        """Send the run off and follow it to its end.

        Args:
            interrupts: counts signals (`runners.signals.Interrupts`), entered already.

        Raises:
            RequestError: it cannot be done as asked; nothing was started.
            LaunchError: what the driver ended with.
            Stopped: a second signal; the run goes on stopping there.
        """
        cluster = self._prepared.job.cluster
        values = packaging.environment(cluster.env)
        mounted = mounts.setup_lines(mounts.read(cluster.mounts))
        self._needs = asdict(NodeSetup.of(self._request.calling, [*mounted, *cluster.setup], cluster.env))
        try:
            kind = base.kind_of(cluster)
            if (url := kind.jobs_url(cluster)) is not None:
                return self._on_url(url, values, interrupts)
            with interrupts.at_once():  # nothing of the run is there yet
                head = kind.provision(cluster, self._note, self._request.calling.absolute(), self._scaling())
            return self._on_head(head, values, interrupts)
        except BaseException as error:
            lost = isinstance(error, WorkerLost) and self._submitted and not self._ended_there
            refused = isinstance(error, LaunchError) and not self._begun and not lost
            if refused and self._before is not None:  # where it was driven before is still where it is to be found
                assert self._recorded is not None
                self._before.write(self._run, cluster=self._recorded.cluster, token=self._recorded.token)
            elif not self._run.exists() and not lost:  # refused before it began: the name stays free
                location.forget(self._run, self._made)
            raise

    def _check_idle(self) -> None:
        """Raise RunError where the run's last driver is still at work: what is known of it here may be old."""
        before = self._before
        if before is None:
            return
        try:
            with connected(self._run) as jobs:
                status = jobs.status(before.job)
        except (LaunchError, Unreachable):  # a cluster that is gone must not keep the run
            self._note(f"{before.where}, where {self._run.name} was driven before, does not answer.")
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
        self._write_down(found, token)
        self._submit(jobs, found, values)
        return self._attended(jobs, found, interrupts)

    def _scaling(self) -> ScalingConfig:
        """Return how many workers there may be at a time: a cluster brings the nodes for them."""
        scaling = self._prepared.job.scaling
        if self._trials is None or scaling.workers == "auto":
            return scaling
        least = scaling.min_workers or scaling.workers
        return replace(scaling, workers=scaling.workers * self._trials, min_workers=least)

    def _on_head(self, head: Head, values: dict[str, str], interrupts: Any) -> RemoteOutcome:
        """Have the head of a cluster that is reached over SSH drive the run, and copy the run's files from there."""
        calling, shell = self._request.calling.absolute(), head.shell()
        directory = f"{head.directory}/runs/{Path(copy_directory(calling)).name}"
        root, there = self._run.root, None
        if self._run.uri is None:
            root, there = directory, f"{directory}/{self._run.name}"
            if len(head.hosts) != 1:  # no disk is known that all of them see
                root = disk_uri(Path(directory))
        found = RunLocation(packaging.new_job(), head=head.name, directory=there, config_dir=self._config_dir)
        with through(head) as jobs:
            self._check_idle()
            self._write_down(found)
            if there is not None and self._prepared.resumes:
                bring(shell, there, self._run)
            cost = rates.overrides(self._prepared.job.cluster, head.usd_per_hour, len(head.hosts) or 1)
            words = [*self._words(root), *cost]
            self._send(jobs, found, words, values, head)
            if there is None or self._prepared.job.cluster.detach:
                return self._attended(jobs, found, interrupts)
            copies = self._copies = Copies(shell, there, self._run)
            try:
                sent = self._attended(jobs, found, interrupts)
            except BaseException:
                with contextlib.suppress(HostError):
                    copies.close(last=self._begun)  # of one that was refused another run may lie there
                raise
            try:
                copies.close(last=not sent.detached)
            except HostError as error:
                self._note(f"Its files are not all here yet; `launch logs {self._run.name}` copies them. {error}")
            return replace(sent, result=self._run.result() or sent.result) if sent.result else sent

    def _send(
        self, jobs: Jobs, found: RunLocation, words: list[str], values: dict[str, str], head: Head | None = None
    ) -> None:
        """Start the driver; where no copy of the project lies on the nodes, it is sent through Ray Jobs."""
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
            if head is not None:  # VMs that come and go have launch from the head: in one place
                driver = packaging.entrypoint("-P", "-m", "launcher.driver", found.job, python=python)
                jobs.submit(found.job, driver, {"PYTHONPATH": f"{head.directory}/launch"}, working_dir=workdir)
                return
            driver = packaging.entrypoint(*packaging.with_own("launcher.driver"), found.job)
            jobs.submit(found.job, driver, {}, [Path(folder) / packaging.OWN], working_dir=workdir)

    def _spec(self, words: list[str], calling: str | None, config_dir: str | None, values: dict[str, str]) -> bytes:
        cluster = asdict(self._prepared.job.cluster)
        more = {"needs": self._needs, "sweep": self._trials is not None, "cluster": cluster}
        return packaging.job_spec(words, calling, config_dir, values, **more)

    def _note(self, text: str) -> None:
        self._on_event({"kind": "note", "text": text})

    def _note_withheld(self, text: str) -> None:
        if text:
            self._note(text)

    def _write_down(self, found: RunLocation, token: str | None = None) -> None:
        """Write where the run is driven into its directory, and record it for this user."""
        self._made = [path for path in (self._run.path, *self._run.path.parents) if not path.exists()]
        self._run.create()
        cluster, known = asdict(self._prepared.job.cluster), token and user_state.fingerprint(token)
        found.write(self._run, cluster=cluster, token=known)

    def _attended(self, jobs: Jobs, found: RunLocation, interrupts: Any) -> RemoteOutcome:
        self._submitted = True
        self._on_sent(found.where)
        if self._prepared.job.cluster.detach:
            return RemoteOutcome({}, detached=True)
        return self._followed(jobs, found, interrupts)

    def _words(self, root: str) -> list[str]:
        own = ("run.name", "run.root")
        kept = [word for word in self._request.words if key_of(word) not in own]
        return [*kept, f"run.name={_quoted(self._run.name)}", f"run.root={_quoted(root)}"]

    def _submit(self, jobs: Jobs, found: RunLocation, values: dict[str, str]) -> None:
        """Compare, send what the cluster does not have, and start the driver there."""
        calling, config_dir = self._request.calling.absolute(), self._request.config_dir
        on_store = self._run.uri is not None
        seen = packaging.probe(jobs, None if on_store else self._run.path, calling)
        if not on_store and not seen.sees_root:
            raise RunError(
                f"The head of the cluster at {jobs.url} does not see {self._run.root}, so that the run would not come "
                "back from there. Mount one directory under the same path on both sides and name it with run.root=…, "
                "or use an object store (run.root=abfss://…, see docs/storage.md)."
            )
        driver = packaging.entrypoint("-P", "-m", "launcher.driver", found.job)
        words = self._words(self._run.root)
        if seen.sees_calling and seen.same_project:
            where = str(config_dir) if config_dir else None
            jobs.put(found.job, self._spec(words, str(calling), where, values))
            jobs.submit(found.job, driver, {"PYTHONPATH": str(project.HOME)})
            return
        self._send(jobs, found, words, values)

    def _followed(self, jobs: Jobs, found: RunLocation, interrupts: Any) -> RemoteOutcome:
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
            handled = interrupts.count  # a Ctrl-C while it was asked belongs to the question
            self._note(f"Stopping: {'its trials save' if self._trials else 'the run saves'} a checkpoint first.")
            with contextlib.suppress(Unreachable):
                jobs.stop(found.job)

        try:
            for event in follow.events(jobs, found.job, found.where, poll, self._run.name):
                if event["kind"] == "end":
                    return self._ended(event, interrupts)
                if event["kind"] == "begun":
                    self._begun = True
                    if self._copies is not None:
                        self._copies.start()
                self._on_event(event)
        except _Detached:
            return RemoteOutcome({}, detached=True)
        raise AssertionError

    def _ended(self, end: Event, interrupts: Any) -> RemoteOutcome:
        self._ended_there = True
        if error := end.get("error"):
            raise from_dict(error)
        if "stopped" in end:
            raise Stopped(interrupts.signal_number or end["stopped"])
        return RemoteOutcome(end["result"], interrupts.signal_number, more=end.get("more", {}))


def _quoted(value: str) -> str:
    """Return a value as Hydra reads it from a word, whatever characters it has."""
    return '"' + value.replace('"', '\\"') + '"'


class _Detached(Exception):
    pass
