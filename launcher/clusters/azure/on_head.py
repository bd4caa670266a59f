"""Programs that run on the head of a cluster of Azure VMs.

    python -m launcher.clusters.azure.on_head watch --nodes 2 --gpus 1 --idle-minutes 10 [--remove]
    python -m launcher.clusters.azure.on_head report          # one JSON object, for `launch up` and `launch status`

The watchdog requests from Ray's autoscaler the nodes that `launch up` waits for, and releases the request when they
have joined or the time limit has passed. Ray then deletes an idle node after `idle_minutes`. The watchdog deletes nodes
that Ray leaves idle for longer, and with --remove the whole resource group when nothing has run for that long. It needs
no connection to the user's machine: a request that is never released, or a dead autoscaler, would cost money forever.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.clusters.azure import failures
from launcher.clusters.azure.spec import DIRECTORY, SPENT_FILE
from launcher.clusters.gcs import as_client, living_nodes
from launcher.ray_seam import private

ADDRESS = "127.0.0.1:6379"
SPENT = Path(SPENT_FILE)  # touched by a run that stopped because its budget is spent (`launcher.money`)
REQUESTED = Path(DIRECTORY) / "requested"  # the number of nodes `launch up` waits for; mtime is the time of the request
LOCK = REQUESTED.with_suffix(".lock")
CONFIG = Path("~/ray_bootstrap_config.yaml")  # Ray's copy of the configuration for `ray up`
LOGS = Path("/tmp/ray/session_latest/logs")
STEP_SECONDS = 5.0
REQUEST_SECONDS = 1800.0  # for machines to be created and to install their packages
GRACE_SECONDS = 180.0  # for Ray to delete idle nodes itself
HOLD_SECONDS = 120.0  # for a run to start on the requested nodes
RPC_SECONDS = 5.0
_TAIL = 2000
# Messages of ssh that do not concern the user.
_CHATTER = re.compile(r"^(Shared )?[Cc]onnection to \S+ closed|^Warning: Permanently added")


@dataclass(frozen=True)
class ClusterState:
    """The state of the cluster at one moment.

    Attributes:
        workers: the number of nodes without the head.
        busy: whether a job runs or a node is in use.
        alive: whether Ray answers on the head. If not, `workers` is a guess.
    """

    workers: int
    busy: bool
    alive: bool = True


class Watchdog:
    """Decides from the state of the cluster which action is due.

    Args:
        idle_seconds: the time without work after which nodes are deleted.
        remove: whether the resource group is deleted after that time as well.
        act: called with an action, "request", "release", "workers" or "group", and a number of nodes. "workers" and
            "group" delete all nodes or the resource group.
        now: seconds since the epoch.
    """

    def __init__(self, idle_seconds: float, remove: bool, act: Callable[[str, int], None], now: float) -> None:
        self._idle_seconds, self._remove, self._act = idle_seconds, remove, act
        self._busy_at = now
        self._active_request = 0
        self._met = 0.0  # the time at which the last request that was met had been made
        self._met_at = 0.0

    def step(
        self, state: ClusterState, requested: int, requested_at: float, now: float, budget_spent: bool = False
    ) -> None:
        """Perform the action that is due.

        Args:
            requested, requested_at: the number of nodes that `launch up` waits for, and the time of the request.
            now: seconds since the epoch.
            budget_spent: whether a run has stopped since then because its budget is spent. Idle nodes are then deleted
                immediately.
        """
        self._busy_at = max(self._busy_at, now if state.busy else 0.0, requested_at)
        if state.workers >= requested and self._met < requested_at:
            self._met, self._met_at = requested_at, now
        waiting = self._met < requested_at and now - requested_at < REQUEST_SECONDS
        # Otherwise Ray would delete nodes with a long idle time just after `launch up` has requested them.
        held = requested > 0 and self._met == requested_at and now - self._met_at < HOLD_SECONDS
        if state.alive and not budget_spent and (waiting or held):
            self._act("request", requested)
            self._active_request = requested
            # While machines are created, or a run starts on them, the cluster is not idle.
            self._busy_at = now
            return
        if self._active_request and state.alive:
            self._act("release", 0)
            self._active_request = 0
        idle = now - self._busy_at
        if self._remove and idle > self._idle_seconds:
            self._act("group", 0)
        elif state.workers and ((budget_spent and not state.busy) or idle > self._idle_seconds + GRACE_SECONDS):
            self._act("workers", state.workers)


def watch(nodes: int, gpus: int, idle_minutes: float, remove: bool) -> None:
    """Run the watchdog forever. Failures are logged and retried.

    Args:
        nodes: the number of nodes that `launch up` waits for.
        gpus: the number of GPUs per node.
        idle_minutes, remove: see `Watchdog`.
    """
    REQUESTED.write_text(str(nodes))

    def act(action: str, count: int) -> None:
        if action in ("request", "release"):
            _request(count, gpus)
            return
        reason = "a budget is spent" if SPENT.exists() else f"idle for {idle_minutes:g} minutes"
        _log(f"{reason}: deleting {action}")
        _delete_workers() if action == "workers" else _delete_group()
        SPENT.unlink(missing_ok=True)

    watchdog = Watchdog(idle_minutes * 60, remove, act, time.time())
    while True:
        try:
            with _exclusive():
                step(watchdog)
        except Exception as error:  # Ray may be starting, or Azure may be busy: the next step retries
            _log(f"{type(error).__name__}: {error}")
        time.sleep(STEP_SECONDS)


def step(watchdog: Watchdog) -> None:
    """Observe the cluster and act once. The caller holds the lock, so that a new request waits until deletions end."""
    requested_at = REQUESTED.stat().st_mtime
    budget_spent = SPENT.exists() and SPENT.stat().st_mtime >= requested_at
    try:
        state = _observe()
    except Exception as error:  # without Ray on the head no work is done, but the nodes cost money
        _log(f"{type(error).__name__}: {error}")
        state = ClusterState(1, busy=False, alive=False)
    watchdog.step(state, int(REQUESTED.read_text() or 0), requested_at, time.time(), budget_spent)
    if budget_spent and not state.workers:
        SPENT.unlink(missing_ok=True)


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    """Hold the lock that a request for nodes takes as well (`node_join.request_line`)."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def report() -> dict[str, Any]:
    """Return the nodes, the failed launches and the errors of the autoscaler.

    Returns:
        nodes: see `capacity.Node`; why_none: the error if the nodes cannot be listed; failures: see
        `failures.LaunchFailure`; monitor_err: the end of the autoscaler's error log.
    """
    nodes: list[dict[str, Any]] = []
    why_none = ""
    try:
        nodes = [asdict(node) for node in living_nodes(ADDRESS)]
    except Exception as error:
        why_none = str(error)
    errors = ""
    with contextlib.suppress(OSError):
        lines = (LOGS / "monitor.err").read_text(errors="replace").splitlines()
        errors = "\n".join(line for line in lines if line.strip() and not _CHATTER.search(line))[-_TAIL:]
    return {
        "nodes": nodes,
        "why_none": why_none,
        "failures": [asdict(failure) for failure in failures.read()],
        "monitor_err": errors,
    }


def _observe() -> ClusterState:
    with _client() as client:
        nodes = private.living_nodes(client, RPC_SECONDS)
        busy = private.has_jobs(client, RPC_SECONDS) or private.in_use(ADDRESS)
    return ClusterState(len(nodes) - 1, busy)


def _request(count: int, gpus: int) -> None:
    with _client():
        private.request_gpu_nodes(ADDRESS, count, gpus)


@contextlib.contextmanager
def _client() -> Any:
    with as_client():
        yield private.gcs_client(ADDRESS)


def _provider() -> Any:
    from launcher.clusters.azure.provider import Provider  # 100 MB that the watchdog does not need until it deletes VMs

    config = yaml.safe_load(CONFIG.expanduser().read_text())
    return Provider(config["provider"], config["cluster_name"])


def _delete_workers() -> None:
    """Delete the VMs of all nodes, except those that have started to work in the meantime."""
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

    provider = _provider()
    machines = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER})
    busy = _drain_idle([str(provider.internal_ip(name)) for name in machines])
    provider.terminate_nodes([name for name in machines if provider.internal_ip(name) not in busy])
    provider.termination_executor.shutdown(wait=True)


def _drain_idle(addresses: Sequence[str]) -> set[str]:
    """Drain the idle nodes among these addresses, and return the addresses of the busy ones.

    A machine that never joined, or without a running Ray, is not busy.
    """
    busy: set[str] = set()
    try:
        with _client() as client:
            for node in private.living_nodes(client, RPC_SECONDS):
                if node.address in addresses:
                    rejection = private.drain(client, node.id, private.IDLE_TERMINATION, "idle", 0, RPC_SECONDS)
                    if rejection is not None:
                        _log(f"{node.address} is not deleted: {rejection}")
                        busy.add(node.address)
    except Exception as error:
        _log(f"{type(error).__name__}: {error}")
    return busy


def _delete_group() -> None:
    """Request the deletion of the resource group, which contains this VM. Azure completes it without this process."""
    provider = _provider()
    provider.resource_client.resource_groups.begin_delete(provider.provider_config["resource_group"])


def _log(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    watch_verb = verbs.add_parser("watch")
    watch_verb.add_argument("--nodes", type=int, required=True)
    watch_verb.add_argument("--gpus", type=int, required=True)
    watch_verb.add_argument("--idle-minutes", type=float, required=True)
    watch_verb.add_argument("--remove", action="store_true")
    verbs.add_parser("report")
    options = parser.parse_args()
    if options.verb == "report":
        json.dump(report(), sys.stdout)
    else:
        watch(options.nodes, options.gpus, options.idle_minutes, options.remove)


if __name__ == "__main__":
    main()
