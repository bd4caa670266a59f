"""Runs on the head of a cluster of Azure VMs.

    python -m launcher.clusters.azure.on_head watch --nodes 2 --gpus 1 --idle-minutes 10 [--remove]
    python -m launcher.clusters.azure.on_head report          # one JSON object, for `launch up` and `launch status`

The watchdog asks Ray's autoscaler for the nodes that `launch up` waits for, and takes the wish back when they are there
or have had their time: an idle one is then deleted by Ray after `idle_minutes`. What Ray leaves standing for longer the
watchdog deletes itself, and with --remove the whole group goes when nothing has run for that long. It needs nobody's
laptop: a wish that was never taken back, or an autoscaler that died, would cost money for ever.
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

from launcher.clusters.azure import failures
from launcher.clusters.azure.spec import DIRECTORY, SPENT_FILE
from launcher.ray_seam import private

ADDRESS = "127.0.0.1:6379"
SPENT = Path(SPENT_FILE)  # touched by a run that has stopped for its budget (`launcher.money`)
WISH = Path(DIRECTORY) / "wish"  # how many nodes `launch up` waits for; its age is that of the wish
LOCK = WISH.with_suffix(".lock")
CONFIG = Path("~/ray_bootstrap_config.yaml")  # Ray's own copy of what `ray up` was told
LOGS = Path("/tmp/ray/session_latest/logs")
STEP_SECONDS = 5.0
WISH_SECONDS = 1800.0  # that machines have to come and install what they need
GRACE_SECONDS = 180.0  # that Ray has for what is its own task
HOLD_SECONDS = 120.0  # that a run has to begin on the nodes that were waited for
RPC_SECONDS = 5.0
_TAIL = 2000
# What ssh says on the way to nodes, and nobody has to know.
_CHATTER = re.compile(r"^(Shared )?[Cc]onnection to \S+ closed|^Warning: Permanently added")


@dataclass(frozen=True)
class Seen:
    """The cluster at one moment.

    Attributes:
        workers: nodes beside the head.
        busy: whether a job runs or a node is at work.
        alive: whether the head's Ray answers; where not, `workers` is a guess.
    """

    workers: int
    busy: bool
    alive: bool = True


class Watch:
    """Decides, from what is seen, what is done. `act` is called with "ask", "release", "workers" or "group".

    Args:
        idle_seconds: without work, after which nodes go.
        remove: whether the group goes as well.
    """

    def __init__(self, idle_seconds: float, remove: bool, act: Callable[[str, int], None], now: float) -> None:
        self._idle_seconds, self._remove, self._act = idle_seconds, remove, act
        self._busy_at = now
        self._asked = 0
        self._met = 0.0  # of the last wish that was met: when it was made
        self._met_at = 0.0

    def step(self, seen: Seen, wish: int, wished_at: float, now: float, spent: bool = False) -> None:
        """wish: how many nodes are waited for, and since when (seconds since the epoch, as `now`).

        spent: a run has stopped for its budget since: nodes without work go at once.
        """
        self._busy_at = max(self._busy_at, now if seen.busy else 0.0, wished_at)
        if seen.workers >= wish and self._met < wished_at:
            self._met, self._met_at = wished_at, now
        waits = self._met < wished_at and now - wished_at < WISH_SECONDS
        # Ray would take away nodes that were idle for long, just when somebody has asked for them.
        held = wish > 0 and self._met == wished_at and now - self._met_at < HOLD_SECONDS
        if seen.alive and not spent and (waits or held):
            self._act("ask", wish)
            self._asked = wish
            # While machines are being made, or a run begins on them, nothing is idle.
            self._busy_at = now
            return
        if self._asked and seen.alive:
            self._act("release", 0)
            self._asked = 0
        idle = now - self._busy_at
        if self._remove and idle > self._idle_seconds:
            self._act("group", 0)
        elif seen.workers and ((spent and not seen.busy) or idle > self._idle_seconds + GRACE_SECONDS):
            self._act("workers", seen.workers)


def watch(nodes: int, gpus: int, idle_minutes: float, remove: bool) -> None:
    """Watch for ever. What fails is written down and tried again."""
    WISH.write_text(str(nodes))

    def act(what: str, count: int) -> None:
        if what in ("ask", "release"):
            _ask(count, gpus)
            return
        why = "a budget is spent" if SPENT.exists() else f"idle for {idle_minutes:g} minutes"
        print(f"{_now()} {why}: deleting {what}", flush=True)
        _delete_workers() if what == "workers" else _delete_group()
        SPENT.unlink(missing_ok=True)

    watched = Watch(idle_minutes * 60, remove, act, time.time())
    while True:
        try:
            with _alone():
                step(watched)
        except Exception as error:  # Ray may be starting, Azure may be busy: the next step tries again
            print(f"{_now()} {type(error).__name__}: {error}", flush=True)
        time.sleep(STEP_SECONDS)


def step(watched: Watch) -> None:
    """Look, and do what is to be done. A wish that is made meanwhile waits for the lock, and finds what is left."""
    wished_at = WISH.stat().st_mtime
    spent = SPENT.exists() and SPENT.stat().st_mtime >= wished_at
    try:
        seen = _seen()
    except Exception as error:  # a head whose Ray is dead does no work, and its nodes cost money
        print(f"{_now()} {type(error).__name__}: {error}", flush=True)
        seen = Seen(1, busy=False, alive=False)
    watched.step(seen, int(WISH.read_text() or 0), wished_at, time.time(), spent)
    if spent and not seen.workers:
        SPENT.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock that whoever makes a wish takes as well (`joining`)."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def report() -> dict[str, Any]:
    """Return what is known here: nodes, launches that failed, and what the autoscaler complains of."""
    from launcher.clusters.gcs import living_nodes

    nodes: list[dict[str, Any]] = []
    why = ""
    try:
        nodes = [asdict(node) for node in living_nodes(ADDRESS)]
    except Exception as error:
        why = str(error)
    complaint = ""
    with contextlib.suppress(OSError):
        lines = (LOGS / "monitor.err").read_text(errors="replace").splitlines()
        complaint = "\n".join(line for line in lines if line.strip() and not _CHATTER.search(line))[-_TAIL:]
    return {
        "nodes": nodes,
        "why_none": why,
        "failures": [asdict(failure) for failure in failures.read()],
        "monitor_err": complaint,
    }


def _seen() -> Seen:
    with _client() as client:
        nodes = private.living_nodes(client, RPC_SECONDS)
        busy = private.has_jobs(client, RPC_SECONDS) or private.in_use(ADDRESS)
    return Seen(len(nodes) - 1, busy)


def _ask(count: int, gpus: int) -> None:
    with _client():
        private.request_gpu_nodes(ADDRESS, count, gpus)


@contextlib.contextmanager
def _client() -> Any:
    from launcher.clusters.gcs import as_client

    with as_client():
        yield private.gcs_client(ADDRESS)


def _configured() -> Any:
    import yaml

    return yaml.safe_load(CONFIG.expanduser().read_text())


def _delete_workers() -> None:
    """Delete the VMs of all nodes but those that have begun to work since they were looked at."""
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND

    from launcher.clusters.azure.provider import Provider

    config = _configured()
    provider = Provider(config["provider"], config["cluster_name"])
    machines = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER})
    busy = _drained_but([str(provider.internal_ip(name)) for name in machines])
    provider.terminate_nodes([name for name in machines if provider.internal_ip(name) not in busy])
    provider.termination_executor.shutdown(wait=True)


def _drained_but(addresses: Sequence[str]) -> set[str]:
    """Have Ray give nothing more to the nodes of these addresses, and return those that are at work.

    A machine that never joined, or whose Ray is dead, is at no work.
    """
    busy: set[str] = set()
    try:
        with _client() as client:
            for node in private.living_nodes(client, RPC_SECONDS):
                if node.address in addresses:
                    why = private.drain(client, node.id, private.IDLE_TERMINATION, "nothing to do", 0, RPC_SECONDS)
                    if why is not None:
                        print(f"{_now()} {node.address} stays: {why}", flush=True)
                        busy.add(node.address)
    except Exception as error:
        print(f"{_now()} {type(error).__name__}: {error}", flush=True)
    return busy


def _delete_group() -> None:
    """Azure takes the request and goes on without us: this VM is in the group."""
    from launcher.clusters.azure.provider import Provider

    config = _configured()
    provider = Provider(config["provider"], config["cluster_name"])
    provider.resource_client.resource_groups.begin_delete(config["provider"]["resource_group"])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    watcher = verbs.add_parser("watch")
    watcher.add_argument("--nodes", type=int, required=True)
    watcher.add_argument("--gpus", type=int, required=True)
    watcher.add_argument("--idle-minutes", type=float, required=True)
    watcher.add_argument("--remove", action="store_true")
    verbs.add_parser("report")
    words = parser.parse_args()
    if words.verb == "report":
        json.dump(report(), sys.stdout)
    else:
        watch(words.nodes, words.gpus, words.idle_minutes, words.remove)


if __name__ == "__main__":
    main()
