"""The rendezvous of the ranks of a run, and the network interface of their process groups.

A store distributes the addresses of the ranks. Stores have no authentication: a process that can connect to one can
redirect the ranks. On one machine the store is a file in a private directory. Between machines it is PyTorch's TCP
store, bound to the address of rank 0's node; the network between the nodes is trusted (docs/security.md).
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
    """Make the process groups of this process listen on loopback only, unless the user has set an interface."""
    use_interface("lo0" if sys.platform == "darwin" else "lo")


def use_interface(name: str) -> None:
    """Make gloo and NCCL use a network interface, unless the user has set one."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, name)


def file_store(directory: Path, key: str, world_size: int, timeout: timedelta) -> FileStore:
    """Return the store of ranks on one machine.

    Args:
        directory: a directory that only this user can access.
        key: the same on all ranks, and unique for each group of ranks: a file of another group has wrong addresses.
    """
    store = FileStore(str(directory / key.replace("/", "-")), world_size)
    store.set_timeout(timeout)
    return store


def of_environment(rank: int, world_size: int, timeout: timedelta, one_machine: bool) -> TCPStore | None:
    """Return the store at MASTER_ADDR and MASTER_PORT, or None if torchrun serves its own store there.

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
    """Return this machine's address for a host name, or "" (all addresses) if other machines cannot reach it.

    Some machines resolve their own name to loopback, and a service may have an address that no interface has.
    """
    try:
        # IPv4 first, as gloo and NCCL prefer it on an interface with both.
        found = sorted(
            socket.getaddrinfo(name, None, type=socket.SOCK_STREAM), key=lambda each: each[0] != socket.AF_INET
        )
        address = str(found[0][4][0])
        socket.create_server((address, 0), family=found[0][0]).close()
    except OSError:
        return ""
    local = address.startswith("127.") or address == "::1"
    return "" if local and name not in (address, "localhost") else address


def serve(host: str, world_size: int, timeout: timedelta, port: int = 0) -> TCPStore:
    """Return the store of rank 0.

    Args:
        host: an address of this machine, see `own_address`. By default PyTorch's store listens on all addresses.

    Raises:
        OSError: the port is in use.
    """
    if not host and socket.has_dualstack_ipv6():
        listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
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
