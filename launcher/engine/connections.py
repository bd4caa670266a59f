"""The TCP connections of a process group over gloo: known by their ports, and cut.

gloo cannot be interrupted (torch 2.13: `ProcessGroup.abort` and `shutdown` change nothing for it). Who waits for a rank
that lives but has left waits until the timeout, unless the connection between the two is cut.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

Address = tuple[str, int]


def listening() -> set[Address]:
    """Return the addresses (host, port) at which this process takes TCP connections."""
    found = set()
    for one in _sockets():
        with contextlib.suppress(OSError):
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(_address(one.getsockname()))
    return found


def cut(listeners: set[Address]) -> None:
    """End every connection of this process that was made to one of `listeners`, whichever end is here."""
    for one in _sockets():
        with contextlib.suppress(OSError):  # not connected, or gone meanwhile
            if {_address(one.getsockname()), _address(one.getpeername())} & listeners:
                one.shutdown(socket.SHUT_RDWR)


def _address(name: tuple[str, int]) -> Address:
    return name[0], name[1]


def _sockets() -> Iterator[socket.socket]:
    """Yield this process's TCP sockets, each for the moment and by a descriptor of its own."""
    for entry in os.listdir("/dev/fd"):
        try:
            descriptor = os.dup(int(entry))
        except OSError:  # closed meanwhile
            continue
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            continue
        with socket.socket(fileno=descriptor) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                yield one
