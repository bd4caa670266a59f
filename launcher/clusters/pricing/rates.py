"""The cost of the machines of a configuration: from the catalogue, or as the configuration specifies it."""

from __future__ import annotations

from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError
from launcher.money import Rate


def rate_of(cluster: ClusterConfig, machines: int = 1, ask: bool = True, nodes: Nodes | None = None) -> Rate | None:
    """Return the rate of a run on this cluster; None if its machines are free or their price is unknown.

    Args:
        machines: the number of machines, including the head.
        ask: whether to query Azure's public price list for today's prices.
        nodes: the VMs of the configuration, if the caller has already determined them.

    Raises:
        ConfigError: a budget is set but a price is unknown; see also `nodes.nodes_for`.
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
            f"cluster.budget_usd={cluster.budget_usd:g} needs the prices of the machines. {' '.join(nodes.missing())} "
            "Set cluster.node_usd_per_hour=USD and cluster.head_usd_per_hour=USD, or omit the budget.",
            key="cluster.budget_usd",
        )
    return None


def overrides(
    cluster: ClusterConfig, usd_per_hour: float | None = None, machines: int = 1, nodes: Nodes | None = None
) -> list[str]:
    """Return the overrides with which a driver on another machine knows the cost of its machines.

    Args:
        usd_per_hour: the total cost of all machines per hour, if it is known.
        machines: the number of these machines.
        nodes: see `rate_of`.
    """
    rate = rate_of(cluster, machines, nodes=nodes)
    if rate is None and usd_per_hour:
        rate = Rate(usd_per_hour / machines, 0.0, machines)
    if rate is None:
        return []
    return [f"cluster.node_usd_per_hour={rate.node:.6g}", f"cluster.head_usd_per_hour={rate.head:.6g}"]
