"""A Ray cluster that runs already, asked by its GCS: who lives there. Becomes no driver and starts nothing.

The address is `cluster.address`, or RAY_ADDRESS. Its token is where Ray looks for it: RAY_AUTH_TOKEN,
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
ANSWER_SECONDS = 1.5  # for a connection to a node; the first packet may be lost, the second goes after one


def address_of(asked: str | None) -> str:
    """Return HOST:PORT of the cluster that is meant.

    Raises:
        ClusterError: none is named, or it is not HOST:PORT.
    """
    address = asked or os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        return address
    found = f"cluster.address is {asked!r}" if asked else f"RAY_ADDRESS is {address!r}" if address else "none was given"
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the Ray Jobs API of a cluster, to which `launch train` sends runs and sweeps. `launch plan` "
            "needs cluster.address=HOST:PORT, on a node of that cluster."
        )
    raise ClusterError(
        f"cluster=existing needs the address of a Ray cluster, and {found}. Write cluster.address=HOST:PORT as "
        "`ray start --head` prints it (port 6379 by default), on a machine that is a node of that cluster."
    )


def living_nodes(address: str) -> list[Node]:
    """Return the nodes that live, by address. Becomes no driver and starts nothing.

    Ray believes in a machine that fell silent for a minute more: of the nodes it knows those count that can be
    connected to. A machine that is no node of the cluster, and may reach the head alone, takes Ray's word.

    Args:
        address: `cluster.address`, or RAY_ADDRESS.

    Raises:
        ClusterError: nobody answers there, or without the right token only.
    """
    _require_answer(address)
    with as_client():
        try:
            alive = private.living_nodes(private.gcs_client(address), CONNECT_SECONDS)
        except Exception as error:
            raise connection_error(address, error) from None
    answers = [True] * len(alive)
    if any(is_here(node.address) for node in alive):
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


def is_here(address: str) -> bool:
    """Whether this machine has the address: only then can it be listened on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _answers(host: str, port: int) -> bool:
    # As `runners.free_capacity` has it, which travels by value and may import nothing.
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
            f"cluster=existing: nobody answers at {address} ({error.strerror or error}). Is Ray running there (`ray "
            "status`), and is this its GCS address, with port 6379 by default?"
        ) from None


def connection_error(address: str, error: Exception) -> ClusterError:
    said = " ".join(str(error).split())
    if "token" in said.lower() or "UNAUTHENTICATED" in said:
        cure = "Give this process the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
    elif "Version mismatch" in said:
        cure = "Use the same versions here and on its nodes."
    else:
        cure = "`ray status` on a node shows whether the cluster is well."
    return ClusterError(f"cluster=existing: the Ray cluster at {address} could not be used: {said[:400]} {cure}")


@contextlib.contextmanager
def as_client(more: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have Ray's native part read how to authenticate: a client does not look for a token by itself."""
    values = dict(more or {})
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()
    if os.environ.get("RAY_AUTH_MODE") == "token" and not has_token:  # Ray's native part would end this process
        raise ClusterError(
            "RAY_AUTH_MODE=token asks for a token, and there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token. Take it from the cluster's head node."
        )
    if has_token:
        values.setdefault("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "token"))
    with environment_set(values):
        private.refresh_settings()
        yield
