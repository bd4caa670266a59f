"""Finds the nodes on which workers can be placed, and the resources that are free on them.

Ray treats a node as alive until it has failed health checks for a minute. A reservation on a machine without a network
is never granted, and blocks the resources that it reserves on other machines (Ray 2.60). So no group may be placed on
such a machine. These functions are pickled by value for the controller; see `controller_policy`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from launcher.ray_seam.private import free_resources, leaving_nodes

ANSWER_SECONDS = 1.5  # for a connection to a node; TCP repeats a lost packet after one second


def alive_nodes() -> list[dict[str, Any]]:
    """Return the nodes that Ray treats as alive, in the format of `ray.nodes()`."""
    return [node for node in ray.nodes() if node["Alive"]]


def unreachable(nodes: Iterable[dict[str, Any]]) -> set[str]:
    """Return the ids of the nodes that refuse or do not answer a connection to their raylet."""
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


def workers_per_node(share: dict[str, float], without: Set[str]) -> dict[str, int]:
    """Return how many workers fit into the free resources of each node. Nodes that are being drained are left out.

    Args:
        share: the resources of one worker.
        without: ids of nodes to leave out.
    """
    nodes = {node["NodeID"] for node in alive_nodes()} - leaving_nodes() - without
    free = free_resources()
    needs = {name: amount for name, amount in share.items() if amount > 0}
    return {
        node: min(int(free.get(node, {}).get(name, 0.0) / amount + 1e-6) for name, amount in needs.items())
        for node in nodes
    }


def free_workers(share: dict[str, float], without: Set[str]) -> int:
    """Return how many workers fit into the free resources of the cluster: the sum of `workers_per_node`."""
    return sum(workers_per_node(share, without).values())
