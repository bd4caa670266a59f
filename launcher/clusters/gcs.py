"""Query the GCS of a running Ray cluster for its nodes, without becoming a driver and without starting anything.

The address is `cluster.address` or RAY_ADDRESS. The token is read from where Ray reads it: RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.clusters.capacity import Node
from launcher.clusters.ray_process import environment_set
from launcher.errors import ClusterError
from launcher.ray_seam import private

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 1.5  # for a connection to a node; a lost first packet is sent again after one second


def address_of(configured: str | None) -> str:
    """Return the address of the cluster as HOST:PORT.

    Args:
        configured: the value of `cluster.address`; RAY_ADDRESS is the default.

    Raises:
        ClusterError: no address is given, or it is not HOST:PORT.
    """
    address = configured or os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        return address
    if configured:
        given = f"cluster.address is {configured!r}"
    else:
        given = f"RAY_ADDRESS is {address!r}" if address else "none was given"
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the Ray Jobs API of a cluster, to which `launch train` submits runs and sweeps. `launch "
            "plan` needs cluster.address=HOST:PORT and must run on a node of that cluster."
        )
    raise ClusterError(
        f"cluster=existing needs the address of a Ray cluster, but {given}. Set cluster.address=HOST:PORT, as "
        "`ray start --head` prints it (port 6379 by default), and run launch on a node of that cluster."
    )


def living_nodes(address: str) -> list[Node]:
    """Return the nodes that are alive, sorted by address, without becoming a driver.

    Ray lists an unreachable machine as alive for another minute. Therefore only those nodes are returned that accept a
    connection. A machine outside the cluster may be able to reach only the head, so there Ray's list is returned.

    Args:
        address: the address of the GCS, HOST:PORT.

    Raises:
        ClusterError: nothing answers at the address, or the token is wrong.
    """
    _require_answer(address)
    with as_client():
        try:
            alive = private.living_nodes(private.gcs_client(address), CONNECT_SECONDS)
        except Exception as error:
            raise connection_error(address, error) from None
    answers = [True] * len(alive)
    if any(is_own_address(node.address) for node in alive):
        with ThreadPoolExecutor(min(32, len(alive))) as pool:
            answers = list(pool.map(lambda node: _answers(node.address, node.port), alive))
    nodes = [
        Node(
            id=node.id,
            host=node.host,
            address=node.address,
            cpus=node.resources.get("CPU", 0.0),
            gpus=node.resources.get("GPU", 0.0),
        )
        for node, answered in zip(alive, answers, strict=True)
        if answered
    ]
    return sorted(nodes, key=lambda node: node.address)


def is_own_address(address: str) -> bool:
    """Return whether the address belongs to this machine, which is tested by binding a socket to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _answers(host: str, port: int) -> bool:
    # `runners.free_capacity` repeats this function: its code is sent to other processes and may import nothing.
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), ANSWER_SECONDS).close()
        return True
    return False


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"cluster=existing: {address} does not answer ({error.strerror or error}). Check that Ray is running there "
            "(`ray status`), and that this is its GCS address, with port 6379 by default."
        ) from None


def connection_error(address: str, error: Exception) -> ClusterError:
    """Return the error for a failed connection to a Ray cluster, with a remedy for the cause that Ray reports."""
    cause = " ".join(str(error).split())
    if "token" in cause.lower() or "UNAUTHENTICATED" in cause:
        remedy = "Provide the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
    elif "Version mismatch" in cause:
        remedy = "Install the same versions on this machine and on the nodes."
    else:
        remedy = "Run `ray status` on a node to check the state of the cluster."
    return ClusterError(f"cluster=existing: connecting to the Ray cluster at {address} failed: {cause[:400]} {remedy}")


@contextlib.contextmanager
def as_client(more: Mapping[str, str] | None = None) -> Iterator[None]:
    """Make Ray's native code read the authentication settings, since a client does not look for a token by itself.

    Args:
        more: further environment variables that are set within the block.

    Raises:
        ClusterError: RAY_AUTH_MODE=token, but there is no token.
    """
    values = dict(more or {})
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()
    if os.environ.get("RAY_AUTH_MODE") == "token" and not has_token:  # Ray's native code would exit this process
        raise ClusterError(
            "RAY_AUTH_MODE=token requires a token, but there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token. Copy it from the head node of the cluster."
        )
    if has_token:
        values.setdefault("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "token"))
    with environment_set(values):
        private.refresh_settings()
        yield
