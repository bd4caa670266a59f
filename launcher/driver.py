"""The driver of a run or sweep on the head of a cluster. It prints its events for the command that submitted the run.

    python -m launcher.driver JOB

The specification of the job (overrides, directories, values of environment variables) is in the memory of the head
until the driver takes it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from launcher.clusters.existing.existing_ray import ExistingRay
from launcher.clusters.gcs import living_nodes
from launcher.clusters.remote import ray_jobs
from launcher.clusters.remote.node_setup import NodeSetup
from launcher.config import Settings
from launcher.config.calling_directory import shared_path
from launcher.errors import ClusterError, LaunchError, Stopped, to_dict
from launcher.jobs import training
from launcher.jobs.prepare import Prepared, Request
from launcher.jobs.remote.wire import Event, EventWriter
from launcher.planning.plan import Plan


class EventForwarder(training.Observer):
    """Writes each event of a run to the job's output."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def prepared(self, prepared: Prepared, plan: Plan | None) -> None:
        self._writer.send(training.begun(prepared, plan))

    def event(self, event: Event) -> None:
        self._writer.send(event)


def main() -> int:
    """Run the job with the id in the first argument, and return its exit status."""
    job = sys.argv[1]
    descriptor = os.dup(1)
    os.dup2(2, 1)  # other output must not share a line with an event
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
        raise ClusterError(f"The specification of the job {job} is missing: its driver was started a second time.")
    spec = json.loads(content)
    os.environ.update(spec["environment"])
    if spec["calling"]:
        os.chdir(spec["calling"])
    _set_up_nodes(NodeSetup(**spec["setup"]), address, observer)
    config_dir = Path(spec["config_dir"]).absolute() if spec["config_dir"] else None
    request = Request(spec["words"], config_dir, on_head=address, settings=Settings.decided(spec["cluster"]))
    if spec["sweep"]:
        return _sweep(request, observer)
    outcome = training.train(request, observer)
    status = 0
    if outcome.signal_number is not None and outcome.result.get("status") == "stopped":
        status = training.exit_status_of(outcome.signal_number)
    return {"status": status, "result": outcome.result}


def _sweep(request: Request, observer: training.Observer) -> dict[str, Any]:
    # Not for a single run: these modules import Optuna, a twelfth of the driver's imports.
    from launcher.sweeps import api, remote

    outcome = api.run(request, remote.EventSender(observer.event))
    return {"status": api.exit_status(outcome), "result": outcome.result, "more": remote.outcome_to_dict(outcome)}


def _set_up_nodes(setup: NodeSetup, address: str, observer: training.Observer) -> None:
    """Install what the job needs on every node, before a module of the calling directory is imported."""
    if not setup:
        return
    observer.event({"kind": "note", "text": f"Preparing the nodes: {setup.describe()}"})
    with ExistingRay(address, environment=setup.names):
        setup.install(living_nodes(address), shared_path(os.getcwd()))
    importlib.invalidate_caches()


if __name__ == "__main__":
    sys.exit(main())
