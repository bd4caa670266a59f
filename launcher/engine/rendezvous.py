"""Where the ranks of a run meet, and the network over which they talk.

A store tells each rank the addresses of the others. Stores have no authentication: a process that reaches one can send
the ranks elsewhere. On one machine it is a file in a private directory. Between machines it is the store of PyTorch,
bound to the address of rank 0's node: the network between the nodes is trusted (docs/security.md).
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

from torch.distributed import FileStore, TCPStore

LOOPBACK = "127.0.0.1"


def stay_on_loopback() -> None:
    """Have the groups of this process listen on loopback alone, unless the user has named an interface."""
    use_interface("lo0" if sys.platform == "darwin" else "lo")


def use_interface(name: str) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, name)


def file_store(directory: Path, key: str, world_size: int, timeout: timedelta) -> FileStore:
    """Return the store of ranks on one machine that agree on `key`.

    Args:
        directory: this user alone can enter it.
        key: another one for each group of ranks. A file that another group has used would mislead this one.
    """
    store = FileStore(str(directory / key.replace("/", "-")), world_size)
    store.set_timeout(timeout)
    return store


def of_environment(rank: int, world_size: int, timeout: timedelta, one_machine: bool) -> TCPStore | None:
    """Return the store at MASTER_ADDR and MASTER_PORT; None where torchrun serves one of its own there.

    Raises:
        OSError: the port is in use.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if one_machine:
        host = LOOPBACK
    if rank:
        return join(host, port, world_size, timeout)
    return serve(own_address(host), world_size, timeout, port)


def own_address(name: str) -> str:
    """Return this machine's address of that name; "" (all addresses) where it is not one that other machines reach.

    Some machines take their own name for loopback, and a service may have an address that no interface has.
    """
    try:
        address = socket.gethostbyname(name)
        socket.create_server((address, 0)).close()
    except OSError:
        return ""
    local = address.startswith("127.")
    return "" if local and name not in (address, "localhost") else address


def serve(host: str, world_size: int, timeout: timedelta, port: int = 0) -> TCPStore:
    """Return the store of rank 0.

    Args:
        host: an address of this machine, see `own_address`; PyTorch's store would listen on all of them.

    Raises:
        OSError: the port is in use.
    """
    if not host and socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server((host, port), backlog=1024)
    return TCPStore(
        host or LOOPBACK,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


def join(host: str, port: int, world_size: int, timeout: timedelta) -> TCPStore:
    """Return the store that rank 0 serves at an address."""
    return TCPStore(host, port, world_size, is_master=False, timeout=timeout)
