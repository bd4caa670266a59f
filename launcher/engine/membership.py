"""Who trains together now: generations of workers, agreed on through a store that outlives each of them.

A generation is an ordered list of members. When one of them is lost, or a new one waits to be let in, every member
announces itself for the next generation, with how far it has come. The list is closed when each member of the last
generation has announced itself or is known to be gone, by whoever sees that first: the store keeps the first list that
is written, so that all read the same. A member that finds itself left out announces itself again, and is let in as a
new one. Nothing here is pickled.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from launcher.engine.runtime import COLLECTIVE_TIMEOUT, Runtime
from launcher.errors import WorkerLost

LOOK_SECONDS = 0.02
ASK_SECONDS = 0.3  # how often a member looks for somebody who waits to be let in
ANSWER_SECONDS = 3.0  # a process that takes longer to say that it lives is as good as gone
MEET_SECONDS = 20.0  # how long the members of a new generation take to connect
GATHER_SECONDS = 30.0  # how long those who lost all others wait for as many as there shall be


class Store(Protocol):
    """A key-value store that every worker reaches, and that lives longer than any."""

    def put(self, key: str, value: str) -> None:
        """Keep `value` under `key`, unless there is one already: the first stays."""
        ...

    def get(self, key: str) -> str | None: ...

    def keys(self, prefix: str) -> list[str]: ...


@dataclass(frozen=True)
class Member:
    """One worker as it announces itself.

    `slot`: its place among the workers that there shall be. `position`: (steps done, part of what follows a step), or
    None for one that has nothing yet. `redoes`: whether a step was under way that it has not finished.
    """

    id: str
    slot: int
    host: str
    port: int
    position: tuple[int, int] | None = None
    redoes: bool = False

    @classmethod
    def of(cls, text: str) -> Member:
        given = json.loads(text)
        position = given.pop("position")
        return cls(**given, position=tuple(position) if position is not None else None)


@dataclass(frozen=True)
class Generation:
    """Those who train together, by rank; `lost`: how many of the generation before are not among them."""

    number: int
    members: tuple[Member, ...]
    lost: int = 0

    @property
    def source(self) -> int | None:
        """The first rank of those that have come farthest; None where nobody has anything."""
        positions = [member.position or (-1, -1) for member in self.members]
        return positions.index(max(positions)) if max(positions) >= (0, 0) else None

    @property
    def behind(self) -> list[int]:
        """The ranks that lack what the source has."""
        if self.source is None:
            return []
        newest = self.members[self.source].position
        return [rank for rank, member in enumerate(self.members) if member.position != newest]


class Membership:
    """One worker's membership.

    Args:
        store: where members meet.
        slot, workers: this worker's place, and how many there shall be.
        host: the address of this node, to which this worker binds.
        secret: known to the workers of this run alone; who does not know it gets no answer.
    """

    def __init__(self, store: Store, slot: int, workers: int, host: str, secret: str) -> None:
        self._store, self._slot, self._workers, self._host, self._secret = store, slot, workers, host, secret
        self._id = uuid.uuid4().hex
        self._door = _Door(host, self._id, secret)
        self._now: Generation | None = None  # the one that this worker belongs to
        self._rendezvous: Any = None
        self._ended = threading.Event()
        self._wanted = False
        self._thread = threading.Thread(target=self._look_for_waiting, name="launch-membership", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> bool:
        """Whether somebody waits to be let in; from memory."""
        return self._wanted

    @property
    def begun(self) -> bool:
        """Whether others have begun without this worker."""
        return self._now is None and self._store.get("generation/0") is not None

    @property
    def finished(self) -> bool:
        """Whether the run has ended in order."""
        return self._store.get("finished") is not None

    def finish(self) -> None:
        self._store.put("finished", "yes")

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._door.close()

    def enter(self, runtime: Runtime) -> None:
        """Be one of the first generation, with `runtime`; or find that others have begun, and do nothing.

        Raises:
            WorkerLost: the members could not connect.
        """
        if not self.begun:
            self._form(Member(self._id, self._slot, self._host, self._door.port), runtime, only_first=True)

    # ---- a new generation -------------------------------------------------------------------------------------------

    def regroup(
        self, runtime: Runtime, position: tuple[int, int] | None = None, redoes: bool = False
    ) -> Generation | None:
        """Leave the present generation, join the next one, and give `runtime` its facts and groups.

        Returns None where the run has ended in order meanwhile.

        Raises:
            WorkerLost: the members could not connect; to be tried again by the caller, who knows what was lost.
        """
        runtime.leave_groups()
        self._rendezvous = None
        return self._form(Member(self._id, self._slot, self._host, self._door.port, position, redoes), runtime)

    def _form(self, me: Member, runtime: Runtime, only_first: bool = False) -> Generation | None:
        generation = self._agree(me, only_first)
        if generation is None:
            return None
        self._now, self._wanted = generation, False
        rank = next(rank for rank, member in enumerate(generation.members) if member.id == self._id)
        try:
            self._meet(generation, rank, runtime)
        except (RuntimeError, dist.DistError) as error:
            raise WorkerLost(f"The workers of generation {generation.number} could not connect: {error}") from error
        return generation

    def _agree(self, me: Member, only_first: bool) -> Generation | None:
        number = 0 if self._now is None else self._now.number + 1
        began = time.monotonic()
        announced = -1
        while True:
            while (closed := self._read(number)) is not None:
                if any(member.id == self._id for member in closed.members):
                    return closed
                if only_first:
                    return None
                number += 1  # closed without this worker, or long ago
            if announced != number:
                self._store.put(f"join/{number}/{me.id}", json.dumps(asdict(me)))
                announced, began = number, time.monotonic()
            if self.finished:
                return None
            if (members := self._complete(number, time.monotonic() - began)) is not None:
                self._store.put(f"generation/{number}", json.dumps([asdict(member) for member in members]))
                continue
            time.sleep(LOOK_SECONDS)

    def _read(self, number: int) -> Generation | None:
        text = self._store.get(f"generation/{number}")
        if text is None:
            return None
        members = tuple(Member.of(json.dumps(one)) for one in json.loads(text))
        before = self._store.get(f"generation/{number - 1}") if number else None
        lost = {one["id"] for one in json.loads(before)} - {one.id for one in members} if before else set()
        return Generation(number, members, len(lost))

    def _complete(self, number: int, waited: float) -> list[Member] | None:
        """Return the members of the next generation in their order, or None while somebody is still to be heard of."""
        texts = [self._store.get(key) for key in self._store.keys(f"join/{number}/")]
        here = {member.id: member for member in (Member.of(text) for text in texts if text)}
        before = self._read(number - 1) if number else None
        old = before.members if before is not None else ()
        for member in old:
            if member.id not in here and waited < COLLECTIVE_TIMEOUT.total_seconds() and self._lives(member):
                return None
        alive = [member for member in here.values() if member.id == self._id or self._lives(member)]
        nobody = not any(member.position for member in alive)
        if nobody and len(alive) < self._workers and (not number or waited < GATHER_SECONDS):
            return None  # all have to begin from the disk: together, if the others come soon
        order = {member.id: rank for rank, member in enumerate(old)}
        return sorted(alive, key=lambda member: (order.get(member.id, len(order)), member.slot))

    def _meet(self, generation: Generation, rank: int, runtime: Runtime) -> None:
        size = len(generation.members)
        key = f"rendezvous/{generation.number}"
        wait = timedelta(seconds=MEET_SECONDS)
        if size > 1:
            if rank == 0:
                self._rendezvous = dist.TCPStore(self._host, 0, is_master=True, timeout=wait, wait_for_workers=False)
                self._store.put(key, str(self._rendezvous.port))
            else:
                end = time.monotonic() + MEET_SECONDS
                while (port := self._store.get(key)) is None:
                    if time.monotonic() > end:
                        raise RuntimeError(f"timed out waiting for {key}")
                    time.sleep(LOOK_SECONDS)
                address = generation.members[0].host
                self._rendezvous = dist.TCPStore(address, int(port), is_master=False, timeout=wait)
        runtime.enter_groups(rank, size, self._rendezvous, wait)

    # ---- who lives --------------------------------------------------------------------------------------------------

    def _lives(self, member: Member) -> bool:
        """Whether the member's process answers. One that was killed refuses the connection at once."""
        try:
            with socket.create_connection((member.host, member.port), timeout=ANSWER_SECONDS) as connection:
                connection.sendall(self._secret.encode() + b"\n")
                return hmac.compare_digest(_line(connection), member.id.encode())
        except OSError:
            return False

    def _look_for_waiting(self) -> None:
        while not self._ended.wait(ASK_SECONDS):
            now = self._now
            if now is None or self._wanted:
                continue
            with contextlib.suppress(Exception):  # a store that cannot be reached now is asked again
                keys = self._store.keys(f"join/{now.number + 1}/")
                texts = [self._store.get(key) for key in keys if not key.endswith(self._id)]
                known = {member.id for member in now.members}
                members = [member for member in (Member.of(text) for text in texts if text) if member.id not in known]
                if any(self._lives(member) for member in members) and self._now is now:
                    self._wanted = True


class _Door:
    """A port on which this process says who it is, to those who know the run's secret: a sign of life."""

    def __init__(self, host: str, answer: str, secret: str) -> None:
        self._answer, self._secret = answer.encode(), secret.encode()
        self._socket = socket.create_server((host, 0), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="launch-door", daemon=True).start()

    def _serve(self) -> None:
        for connection in self._visitors():
            with contextlib.suppress(OSError), connection:
                connection.settimeout(ANSWER_SECONDS)
                if hmac.compare_digest(_line(connection), self._secret):
                    connection.sendall(self._answer + b"\n")

    def _visitors(self) -> Iterator[socket.socket]:
        while True:
            try:
                yield self._socket.accept()[0]
            except OSError:  # closed
                return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _line(connection: socket.socket) -> bytes:
    """Return what comes until the end of the line, at most 200 bytes."""
    found = b""
    while not found.endswith(b"\n") and len(found) < 200 and (more := connection.recv(200)):
        found += more
    return found.rstrip(b"\n")
