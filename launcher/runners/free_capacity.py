"""Where workers can be placed: the nodes that answer, and what is free on them.

Ray holds a node for alive until it has missed its questions for a minute. What is reserved meanwhile on a machine whose
network is gone is never granted, and what was reserved beside it on other machines is not given back (Ray 2.60): a
group must not be placed there. These functions travel to the controller by value, see `controller_policy`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from launcher.ray_seam.private import free_resources, leaving_nodes

ANSWER_SECONDS = 1.5  # for a connection to a node; the first packet may be lost, the second goes after one


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes that Ray believes alive, as `ray.nodes()` describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def unreachable(nodes: Iterable[dict[str, Any]]) -> set[str]:
    """Return the ids of those nodes whose raylet cannot be connected to."""
    nodes = list(nodes)
    if not nodes:
        return set()
    with ThreadPoolExecutor(min(32, len(nodes))) as pool:
        return {node["NodeID"] for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if not answers}


def _answers(node: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
        return True
    return False


def rooms(share: dict[str, float], without: Set[str]) -> dict[str, int]:
    """Return for each node that stays how many workers fit into what is free on it now.

    Args:
        share: what each worker reserves.
        without: nodes that do not count.
    """
    nodes = {node["NodeID"] for node in alive_nodes()} - leaving_nodes() - without
    free = free_resources()
    needs = {name: amount for name, amount in share.items() if amount > 0}
    return {
        node: min(int(free.get(node, {}).get(name, 0.0) / amount + 1e-6) for name, amount in needs.items())
        for node in nodes
    }


def room(share: dict[str, float], without: Set[str]) -> int:
    """Return how many workers fit into what is free now on the nodes that stay: the sum of `rooms`."""
    return sum(rooms(share, without).values())
