"""Tells the cluster that Azure is about to take this VM away. A small program that runs beside Ray on every node:

    python -m launcher.clusters.eviction --address HEAD:6379

Each second it asks Azure's Scheduled Events (a service of the VM's own host, at a link-local address). A notice for
this VM is published at once in the key-value store of the cluster, where running jobs look for it, and taken back when
Azure takes it back. Ray cannot undo a drain, so the node is drained as late as that makes sense: by the job that leaves
it, or here `--drain-seconds` before the deadline. SIGTERM counts as a notice (a VM that shuts down sends it to all its
services); SIGINT ends the program and tells nobody.

Preempt, Terminate, Reboot and Redeploy end the processes of a VM, so they are the same to a job. Freeze pauses the VM
for some seconds and loses nothing: it is logged alone, since collectives wait longer than that.

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

PREFIX = "eviction/"  # of the keys in the cluster's key-value store: one a node, named by its Ray node id

METADATA = "http://169.254.169.254"
METADATA_VARIABLE = "LAUNCH_METADATA_URL"
EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
NAME_PATH = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
FIRST_ANSWER_SECONDS = 150.0  # the first question switches the service on, which takes up to two minutes
ANSWER_SECONDS = 5.0
DRAIN_SECONDS = 2.0
TERM_SECONDS = 15.0
ENDS_THE_VM = frozenset({"preempt", "terminate", "reboot", "redeploy"})
RPC_SECONDS = 3.0


@dataclass(frozen=True)
class Notice:
    """That a VM goes away.

    `kind`: Azure's event type, or "SIGTERM". `deadline`: seconds since the epoch; before it the VM is left alone.
    `event`: what tells this notice from a later one for the same VM.
    """

    vm: str
    kind: str
    deadline: float
    event: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str | bytes) -> Notice:
        """Raises ValueError or TypeError where `text` is not a notice."""
        return cls(**json.loads(text))


def notice_in(document: dict[str, Any], vm: str, now: float) -> Notice | None:
    """Return the first thing that ends `vm` according to a document of Scheduled Events, or None.

    An event that has begun has no NotBefore: its deadline is `now`.

    Raises:
        ValueError: this is no such document. (That it has no events must be said, not left out: a broken answer would
            take a notice back.)
    """
    events = document.get("Events") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise ValueError("the answer of Scheduled Events has no list of events")
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
    except (KeyError, TypeError, ValueError):  # begun, or not to be understood: it may happen at once
        return now


class Metadata:
    """The service at a VM's link-local address. `base` is a URL without a path; no proxy is asked."""

    def __init__(self, base: str = METADATA) -> None:
        address = urlsplit(base)
        self._host, self._port = address.hostname or "", address.port or 80

    def events(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        return json.loads(self._get(EVENTS_PATH, seconds))

    def vm(self) -> str:
        return self._get(NAME_PATH, ANSWER_SECONDS).decode().strip()

    def _get(self, path: str, seconds: float) -> bytes:
        """Raises OSError or http.client.HTTPException where there is no answer that says 200."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=seconds)
        try:
            connection.request("GET", path, headers={"Metadata": "true"})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise OSError(f"{path.partition('?')[0]} answers {answer.status} {answer.reason}")
        return body


class NodeControl(Protocol):
    """What the agent does to the cluster. All of it may raise, and is then tried again."""

    def publish(self, notice: Notice) -> None: ...

    def withdraw(self) -> None: ...

    def drain(self, notice: Notice) -> None: ...


class RayNode:
    """This machine's node of a Ray cluster. Ray is imported when something is to be said: it takes a second, and 100 MB
    that nobody needs before.

    Args:
        address: of the cluster's head, "host:port".
        ip: this node's address in the cluster; default: the one that this machine reaches the head from.
        node_id: this node's id in hexadecimal, where several nodes have one address.
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
        """Look anew each time where the id was not given: the Ray of this machine may have been started again."""
        if self._node_id is not None:
            return self._node_id
        own = self._ip or _own_address(self._address)
        found = [node.id for node in private.living_nodes(self._gcs(), RPC_SECONDS) if node.address == own]
        if len(found) != 1:
            raise OSError(f"{len(found)} nodes of the Ray cluster at {self._address} have the address {own}")
        return found[0]


def drain(client: Any, node_id: str, notice: Notice) -> None:
    """Have Ray place nothing more on a node; what runs there runs on to the deadline. It cannot be undone.

    Args:
        client: a GcsClient.
    """
    message = f"{notice.kind} of {notice.vm}"
    why = private.drain(client, node_id, private.PREEMPTION, message, notice.deadline, RPC_SECONDS)
    if why is not None:
        raise OSError(f"Ray does not drain node {node_id}: {why}")


def _own_address(head: str) -> str:
    host, _, port = head.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host, int(port)))
        return probe.getsockname()[0]


class Agent:
    """Turns what is known of this VM into what the cluster is told. Call `step` often; it does what is due."""

    def __init__(self, node: NodeControl, drain_seconds: float, log: Callable[[str], None]) -> None:
        self._node, self._drain_seconds, self._log = node, drain_seconds, log
        self._azure: Notice | None = None
        self._term: Notice | None = None
        self._published: Notice | None = None
        self._drained = False
        self._trouble = ""

    @property
    def notice(self) -> Notice | None:
        """The one that ends the VM first."""
        return min(filter(None, (self._azure, self._term)), key=lambda notice: notice.deadline, default=None)

    def seen(self, notice: Notice | None) -> None:
        """Take what Azure's newest document says. An event that has begun keeps its first deadline."""
        before = self._azure
        if before and notice and before.event == notice.event:
            notice = Notice(notice.vm, notice.kind, min(before.deadline, notice.deadline), notice.event)
        if notice and notice != before:
            self._log(f"{notice.kind} of {notice.vm} in {notice.deadline - time.time():.0f} s")
        elif before and not notice:
            gone = "it was drained already and stays so" if self._drained else "nothing was done to the node"
            self._log(f"{before.kind} of {before.vm} is withdrawn, or over; {gone}")
        self._azure = notice

    def terminated(self, vm: str, now: float, seconds: float) -> None:
        """Take a SIGTERM for a notice of so many seconds."""
        if self._term is None:
            self._term = Notice(vm, "SIGTERM", now + seconds, f"SIGTERM-{now:.3f}")
            self._log(f"SIGTERM: the node is taken to end in {seconds:g} s")

    def step(self, now: float) -> None:
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
            self._trouble = ""
        except Exception as error:  # the head may be busy or away for a moment: the next step tries again
            trouble = f"the cluster could not be told: {type(error).__name__}: {error}"
            if trouble != self._trouble:
                self._log(trouble)
            self._trouble = trouble


class Poll:
    """A thread that asks the metadata service, so that a slow answer keeps nobody from hearing a signal.

    Args:
        vm: the VM's name; None: it is asked for, until there is an answer.
        take: called with what each whole document says of this VM. Without an answer nothing is known to have changed.
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
                self._said("the metadata service answers again", silent=False)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._said(f"no answer from the metadata service: {type(error).__name__}: {error}", silent=True)
            self._ended.wait(max(0.0, began + self._interval - time.monotonic()))

    def _ask(self) -> None:
        if self.vm is None:
            self.vm = self._metadata.vm()
        document = self._metadata.events(ANSWER_SECONDS if self._answered else FIRST_ANSWER_SECONDS)
        self._answered = True
        self._take(notice_in(document, self.vm, time.time()))

    def _said(self, text: str, silent: bool) -> None:
        """Tell a change once, not each second."""
        if silent != self._silent:
            self._silent = silent
            self._log(text)


def watch(node: NodeControl, metadata: Metadata, options: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Be the agent, until SIGINT, or until the time after a SIGTERM is over. For the main thread.

    A thread asks Azure and one tells the cluster: either may be kept waiting, and a signal is heard nevertheless.
    """
    agent = Agent(node, options.drain_seconds, log)
    news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # what the agent is to know, put by anybody
    last = [float("inf")]

    def told_to_end(number: int, frame: Any) -> None:
        now = time.time()
        if number == signal.SIGTERM:
            news.put(partial(agent.terminated, poll.vm or socket.gethostname(), now, options.term_seconds))
            now += options.term_seconds
        last[0] = min(last[0], now)

    def act() -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                news.get(timeout=options.interval / 2)()
            agent.step(time.time())

    poll = Poll(metadata, options.vm, options.interval, lambda notice: news.put(partial(agent.seen, notice)), log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told_to_end)
    poll.start()
    threading.Thread(target=act, name="launch-eviction", daemon=True).start()
    while time.time() < last[0]:
        time.sleep(0.2)
    poll.end()


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m launcher.clusters.eviction", description=__doc__.splitlines()[0])
    flags.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="the head, host:port (RAY_ADDRESS)")
    flags.add_argument("--node-ip", help="this node's address in the cluster")
    flags.add_argument("--node-id", help="this node's Ray id, where several nodes share one address")
    flags.add_argument("--vm", help="this VM's name; default: the metadata service is asked")
    flags.add_argument(
        "--metadata", default=os.environ.get(METADATA_VARIABLE, METADATA), help=f"URL ({METADATA_VARIABLE})"
    )
    flags.add_argument("--interval", type=float, default=1.0, help="seconds between two questions")
    flags.add_argument(
        "--drain-seconds", type=float, default=DRAIN_SECONDS, help="how long before the deadline Ray drains the node"
    )
    flags.add_argument(
        "--term-seconds", type=float, default=TERM_SECONDS, help="how long the node is taken to live after SIGTERM"
    )
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = parser()
    options = flags.parse_args(arguments)
    if not options.address:
        flags.error("--address or RAY_ADDRESS: the head of the Ray cluster, host:port")

    def log(text: str) -> None:
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} eviction: {text}", file=sys.stderr, flush=True)

    watch(RayNode(options.address, options.node_ip, options.node_id), Metadata(options.metadata), options, log)
    os._exit(0)  # not held up by a thread that waits for a cluster that is gone


if __name__ == "__main__":
    main()
