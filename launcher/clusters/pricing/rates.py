"""What the machines of a configuration cost: by the catalogue, or as the configuration says itself."""

from __future__ import annotations

from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError
from launcher.money import Rate


def rate_of(cluster: ClusterConfig, machines: int = 1, ask: bool = True, nodes: Nodes | None = None) -> Rate | None:
    """Return the rate of a run there; None where its machines cost nothing, or nobody knows what.

    Args:
        machines: how many there are, the head included.
        ask: Azure's public list for today's prices.
        nodes: what the configuration asks for, where that is known.

    Raises:
        ConfigError: there is a budget and a price is not known; or see `nodes.nodes_for`.
    """
    if cluster.node_usd_per_hour is not None:
        return Rate(cluster.node_usd_per_hour, cluster.head_usd_per_hour or 0.0, machines, cluster.budget_usd)
    if cluster.size is None or not cluster.of_kind.is_rented:
        return None
    nodes = nodes or nodes_for(cluster, ask)
    node, head = nodes.counted_price, nodes.head_price
    if node is not None and head is not None:
        return Rate(node.usd_per_hour, head.usd_per_hour, machines, cluster.budget_usd)
    if cluster.budget_usd is not None:
        raise ConfigError(
            f"cluster.budget_usd={cluster.budget_usd:g} cannot be kept: {' '.join(nodes.missing())} Say what the "
            "machines cost with cluster.node_usd_per_hour=USD cluster.head_usd_per_hour=USD, or leave the budget out."
        )
    return None


def overrides(
    cluster: ClusterConfig, usd_per_hour: float | None = None, machines: int = 1, nodes: Nodes | None = None
) -> list[str]:
    """Return the words of a command line that tell a driver elsewhere what its machines cost.

    Args:
        usd_per_hour: of all machines together, where they are known to cost that much.
        machines: how many those are.
        nodes: see `rate_of`.
    """
    rate = rate_of(cluster, machines, nodes=nodes)
    if rate is None and usd_per_hour:
        rate = Rate(usd_per_hour / machines, 0.0, machines)
    if rate is None:
        return []
    return [f"cluster.node_usd_per_hour={rate.node:.6g}", f"cluster.head_usd_per_hour={rate.head:.6g}"]
