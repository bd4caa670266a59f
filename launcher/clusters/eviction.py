"""Notify the Ray cluster that Azure is about to evict this VM. An agent that runs next to Ray on every node:

    python -m launcher.clusters.eviction --address HEAD:6379

The agent polls Azure Scheduled Events (a service of the VM's host, at a link-local address) once per second. It
publishes a notice for this VM immediately in the key-value store of the cluster, where running jobs look for it, and
withdraws the notice if Azure cancels the event. Ray cannot undo a drain, so the node is drained as late as possible: by
the job when it leaves the node, or by this agent `--drain-seconds` before the deadline. SIGTERM counts as a notice,
because a VM that shuts down sends it to all services. SIGINT stops the agent without a notice.

Preempt, Terminate, Reboot and Redeploy all end the processes of a VM, so they are treated alike. Freeze pauses the VM
for a few seconds and loses nothing; since collectives wait longer than that, it needs no notice.

Azure's documentation: https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from launcher.ray_seam import kv, private

PREFIX = "eviction/"  # of the keys in the cluster's key-value store; one key per node, with its Ray node id

METADATA = "http://169.254.169.254"
METADATA_VARIABLE = "LAUNCH_METADATA_URL"
EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
NAME_PATH = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
FIRST_ANSWER_SECONDS = 150.0  # the first request activates the service, which takes up to two minutes
ANSWER_SECONDS = 5.0
DRAIN_SECONDS = 2.0
TERM_SECONDS = 15.0
ENDS_THE_VM = frozenset({"preempt", "terminate", "reboot", "redeploy"})
RPC_SECONDS = 3.0


@dataclass(frozen=True)
class Notice:
    """An announcement that a VM will be stopped.

    Attributes:
        vm: the name of the VM.
        kind: Azure's event type, or "SIGTERM".
        deadline: the earliest time at which the VM is stopped, in seconds since the epoch.
        event: an id that distinguishes this notice from a later one for the same VM.
    """

    vm: str
    kind: str
    deadline: float
    event: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str | bytes) -> Notice:
        """Parse a notice. Raises ValueError or TypeError if `text` is not one."""
        return cls(**json.loads(text))


def notice_in(document: dict[str, Any], vm: str, now: float) -> Notice | None:
    """Return the earliest event that stops `vm` in a document of Scheduled Events, or None.

    An event that has started has no NotBefore: its deadline is `now`.

    Raises:
        ValueError: the document has no list of events. A document without events has an empty list, so a broken
            answer never withdraws a notice.
    """
    events = document.get("Events") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise ValueError("the response of Scheduled Events has no list of events")
    found = []
    for event in events:
        if not isinstance(event, dict) or str(event.get("EventType", "")).lower() not in ENDS_THE_VM:
            continue
        names = [str(name).lower() for name in event.get("Resources") or []]
        if vm.lower() in names and str(event.get("EventStatus", "")).lower() not in ("completed", "canceled"):
            deadline = _deadline(event, now)
            found.append(Notice(vm, str(event["EventType"]), deadline, str(event.get("EventId") or deadline)))
    return min(found, key=lambda notice: notice.deadline, default=None)


def _deadline(event: dict[str, Any], now: float) -> float:
    try:
        return parsedate_to_datetime(event["NotBefore"]).timestamp()
    except (KeyError, TypeError, ValueError):  # it has started, or the time cannot be parsed
        return now


class Metadata:
    """A client of the metadata service of a VM.

    Args:
        base: the URL of the service, without a path. Proxies are ignored.
    """

    def __init__(self, base: str = METADATA) -> None:
        address = urlsplit(base)
        self._host, self._port = address.hostname or "", address.port or 80

    def events(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        return json.loads(self._get(EVENTS_PATH, seconds))

    def vm(self) -> str:
        return self._get(NAME_PATH, ANSWER_SECONDS).decode().strip()

    def _get(self, path: str, seconds: float) -> bytes:
        """Send a GET request. Raises OSError or http.client.HTTPException unless the response has status 200."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        try:
            connection.request("GET", path, headers={"Metadata": "true"})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise OSError(f"{path.partition('?')[0]} returned HTTP {answer.status} {answer.reason}")
        return body


class NodeControl(Protocol):
    """The operations of the agent on its node of the cluster. If one raises an exception, it is retried."""

    def publish(self, notice: Notice) -> None: ...

    def withdraw(self) -> None: ...

    def drain(self, notice: Notice) -> None: ...


class RayNode:
    """The Ray node of this machine. Ray (100 MB of memory) is imported only when there is a notice to publish.

    Args:
        address: the address of the head, "host:port".
        ip: the IP address of this node in the cluster; default: the source address of connections to the head.
        node_id: the Ray id of this node in hexadecimal; required if several nodes share one IP address.
    """

    def __init__(self, address: str, ip: str | None = None, node_id: str | None = None) -> None:
        self._address, self._ip, self._node_id = address, ip, node_id
        self._client: Any = None

    def publish(self, notice: Notice) -> None:
        kv.put(self._key(), notice.to_json(), self._gcs(), RPC_SECONDS)

    def withdraw(self) -> None:
        kv.delete(self._key(), self._gcs(), RPC_SECONDS)

    def drain(self, notice: Notice) -> None:
        drain(self._gcs(), self._own_id(), notice)

    def _gcs(self) -> Any:
        if self._client is None:
            self._client = private.gcs_client(self._address)
        return self._client

    def _key(self) -> str:
        return f"{PREFIX}{self._own_id()}"

    def _own_id(self) -> str:
        """Return the id of this node. Unless it was given, look it up each time, since Ray may have been restarted."""
        if self._node_id is not None:
            return self._node_id
        own = self._ip or _own_address(self._address)
        found = [node.id for node in private.living_nodes(self._gcs(), RPC_SECONDS) if node.address == own]
        if len(found) != 1:
            raise OSError(f"{len(found)} nodes of the Ray cluster at {self._address} have the address {own}")
        return found[0]


def drain(client: Any, node_id: str, notice: Notice) -> None:
    """Drain a node: Ray schedules nothing more on it, and running tasks continue until the deadline. Irreversible.

    Args:
        client: a GcsClient.

    Raises:
        OSError: Ray rejected the request.
    """
    message = f"{notice.kind} of {notice.vm}"
    rejection = private.drain(client, node_id, private.PREEMPTION, message, notice.deadline, RPC_SECONDS)
    if rejection is not None:
        raise OSError(f"Ray rejected the request to drain node {node_id}: {rejection}")


def _own_address(head: str) -> str:
    host, _, port = head.rpartition(":")
    family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connect() on UDP sends nothing
        probe.connect(place)
        return str(probe.getsockname()[0])


class Agent:
    """Publishes, withdraws and drains according to the notices for this VM. `step` must be called often."""

    def __init__(self, node: NodeControl, drain_seconds: float, log: Callable[[str], None]) -> None:
        self._node, self._drain_seconds, self._log = node, drain_seconds, log
        self._azure: Notice | None = None
        self._term: Notice | None = None
        self._published: Notice | None = None
        self._drained = False
        self._failure = ""

    @property
    def notice(self) -> Notice | None:
        """Return the notice with the earliest deadline, or None."""
        return min(filter(None, (self._azure, self._term)), key=lambda notice: notice.deadline, default=None)

    def seen(self, notice: Notice | None) -> None:
        """Record the notice in Azure's newest document. The deadline of an event never moves to a later time."""
        before = self._azure
        if before and notice and before.event == notice.event:
            notice = Notice(notice.vm, notice.kind, min(before.deadline, notice.deadline), notice.event)
        if notice and notice != before:
            self._log(f"{notice.kind} of {notice.vm} in {notice.deadline - time.time():.0f} s")
        elif before and not notice:
            effect = "the node was already drained and stays drained" if self._drained else "the node was not drained"
            self._log(f"{before.kind} of {before.vm} was canceled or has completed; {effect}")
        self._azure = notice

    def terminated(self, vm: str, now: float, seconds: float) -> None:
        """Record a SIGTERM as a notice whose deadline is `seconds` from now."""
        if self._term is None:
            self._term = Notice(vm, "SIGTERM", now + seconds, f"SIGTERM-{now:.3f}")
            self._log(f"SIGTERM received: assuming that the node stops in {seconds:g} s")

    def step(self, now: float) -> None:
        """Publish or withdraw a changed notice, and drain the node when its deadline is near. now: epoch seconds."""
        notice = self.notice
        try:
            if notice is None and self._published is not None:
                self._node.withdraw()
            elif notice is not None and notice != self._published:
                self._node.publish(notice)
            self._published = notice
            if notice is not None and not self._drained and now >= notice.deadline - self._drain_seconds:
                self._node.drain(notice)
                self._drained = True
                self._log("the node is drained")
            self._failure = ""
        except Exception as error:  # the head may be busy or unreachable for a moment: the next step retries
            failure = f"the cluster could not be notified: {type(error).__name__}: {error}"
            if failure != self._failure:
                self._log(failure)
            self._failure = failure


class Poll:
    """A thread that polls the metadata service, so that a slow response does not delay signals.

    Args:
        vm: the name of the VM; None: query the service for it.
        interval: seconds between two requests.
        take: called with the notice for this VM in each valid document. It is not called without a valid response.
        log: called with each line of the log.
    """

    def __init__(
        self,
        metadata: Metadata,
        vm: str | None,
        interval: float,
        take: Callable[[Notice | None], None],
        log: Callable[[str], None],
    ) -> None:
        self._metadata, self.vm, self._interval, self._take, self._log = metadata, vm, interval, take, log
        self._answered = False
        self._silent = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="launch-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                self._ask()
                self._report("the metadata service responds again", silent=False)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._report(f"no response from the metadata service: {type(error).__name__}: {error}", silent=True)
            self._ended.wait(max(0.0, began + self._interval - time.monotonic()))

    def _ask(self) -> None:
        if self.vm is None:
            self.vm = self._metadata.vm()
        document = self._metadata.events(ANSWER_SECONDS if self._answered else FIRST_ANSWER_SECONDS)
        self._answered = True
        self._take(notice_in(document, self.vm, time.time()))

    def _report(self, text: str, silent: bool) -> None:
        """Log a change between responding and silent once, not every second."""
        if silent != self._silent:
            self._silent = silent
            self._log(text)


def watch(node: NodeControl, metadata: Metadata, options: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Run the agent until SIGINT, or until `--term-seconds` after SIGTERM. Must be called from the main thread.

    One thread polls Azure and another notifies the cluster. Both may block, and signals are handled nevertheless.
    """
    agent = Agent(node, options.drain_seconds, log)
    updates: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # calls on the agent, from any thread
    end = [float("inf")]

    def stop(number: int, frame: Any) -> None:
        now = time.time()
        if number == signal.SIGTERM:
            updates.put(partial(agent.terminated, poll.vm or socket.gethostname(), now, options.term_seconds))
            now += options.term_seconds
        end[0] = min(end[0], now)

    def act() -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                updates.get(timeout=options.interval / 2)()
            agent.step(time.time())

    poll = Poll(metadata, options.vm, options.interval, lambda notice: updates.put(partial(agent.seen, notice)), log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    poll.start()
    threading.Thread(target=act, name="launch-eviction", daemon=True).start()
    while time.time() < end[0]:
        time.sleep(0.2)
    poll.end()


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m launcher.clusters.eviction", description=__doc__.splitlines()[0])
    flags.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS"), help="address of the head, host:port (RAY_ADDRESS)"
    )
    flags.add_argument("--node-ip", help="IP address of this node in the cluster")
    flags.add_argument("--node-id", help="Ray id of this node, if several nodes share one address")
    flags.add_argument("--vm", help="name of this VM; default: from the metadata service")
    flags.add_argument(
        "--metadata", default=os.environ.get(METADATA_VARIABLE, METADATA), help=f"URL ({METADATA_VARIABLE})"
    )
    flags.add_argument("--interval", type=float, default=1.0, help="seconds between two requests")
    flags.add_argument(
        "--drain-seconds",
        type=float,
        default=DRAIN_SECONDS,
        help="seconds from the drain to the deadline",
    )
    flags.add_argument(
        "--term-seconds", type=float, default=TERM_SECONDS, help="assumed seconds from SIGTERM to the stop of the node"
    )
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = parser()
    options = flags.parse_args(arguments)
    if not options.address:
        flags.error("set --address or RAY_ADDRESS to the address of the head, host:port")

    def log(text: str) -> None:
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} eviction: {text}", file=sys.stderr, flush=True)

    watch(RayNode(options.address, options.node_ip, options.node_id), Metadata(options.metadata), options, log)
    os._exit(0)  # a thread may still wait for a cluster that no longer exists


if __name__ == "__main__":
    main()
