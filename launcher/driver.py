"""The driver of a run, or of a sweep, on the head of a cluster: as anywhere, and told line by line to whoever sent it.

    python -m launcher.driver JOB

The order (words, directories, values of the environment) lies in the memory of the head until it is taken here.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from launcher import sweeps
from launcher.clusters.existing.existing_ray import ExistingRay
from launcher.clusters.gcs import living_nodes
from launcher.clusters.remote import ray_jobs
from launcher.clusters.remote.node_setup import NodeSetup
from launcher.config import Settings
from launcher.errors import ClusterError, LaunchError, Stopped, to_dict
from launcher.jobs import training
from launcher.jobs.prepare import Prepared, Request
from launcher.jobs.remote.wire import Event, EventWriter
from launcher.planning.plan import Plan
from launcher.sweeps import remote


class EventForwarder(training.Observer):
    """Passes everything on."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def prepared(self, prepared: Prepared, plan: Plan | None) -> None:
        self._writer.send(training.begun(prepared, plan))

    def event(self, event: Event) -> None:
        self._writer.send(event)


def main() -> int:
    """Drive the run that was ordered, and return its exit status."""
    job = sys.argv[1]
    descriptor = os.dup(1)
    os.dup2(2, 1)  # what is printed past us is not mixed with events on the same line
    with EventWriter(descriptor, job) as writer:
        try:
            end = _drive(job, EventForwarder(writer))
        except LaunchError as error:
            end = {"status": error.exit_status, "error": to_dict(error)}
        except Stopped as stopped:
            end = {"status": training.exit_status_of(stopped.signal_number), "stopped": stopped.signal_number}
        except Exception as error:
            end = {"status": 1, "error": to_dict(error)}
        writer.send({"kind": "end", **end})
    return int(end["status"])


def _drive(job: str, observer: training.Observer) -> dict[str, Any]:
    address = os.environ.get("RAY_ADDRESS", "")
    content = ray_jobs.take(address, job)
    if content is None:
        raise ClusterError(f"The order of the job {job} is not there: its driver was started a second time.")
    order = json.loads(content)
    os.environ.update(order["environment"])
    if order["calling"]:
        os.chdir(order["calling"])
    _meet(NodeSetup(**order["needs"]), address, observer)
    config_dir = Path(order["config_dir"]).absolute() if order["config_dir"] else None
    request = Request(order["words"], config_dir, on_head=address, settings=Settings.decided(order["cluster"]))
    if order["sweep"]:
        return _sweep(request, remote.EventSender(observer.event))
    outcome = training.train(request, observer)
    status = 0
    if outcome.signal_number is not None and outcome.result.get("status") == "stopped":
        status = training.exit_status_of(outcome.signal_number)
    return {"status": status, "result": outcome.result}


def _sweep(request: Request, observer: remote.EventSender) -> dict[str, Any]:
    outcome = sweeps.run(request, observer)
    return {"status": sweeps.exit_status(outcome), "result": outcome.result, "more": remote.outcome_to_dict(outcome)}


def _meet(needs: NodeSetup, address: str, observer: training.Observer) -> None:
    """Have every node get what the job needs, before anything of the calling directory is imported here."""
    if not needs:
        return
    observer.event({"kind": "note", "text": f"Preparing the nodes: {needs.describe()}"})
    with ExistingRay(address, environment=needs.names):
        needs.install(living_nodes(address), os.getcwd())
    importlib.invalidate_caches()


if __name__ == "__main__":
    sys.exit(main())
