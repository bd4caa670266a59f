"""The VMs of a configuration: their cost, their quotas, and the source of the prices."""

from __future__ import annotations

import re

import pytest

from launcher.clusters.pricing import catalogue
from launcher.clusters.pricing.nodes import nodes_for
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError

A100 = "Standard_NC24ads_A100_v4"


@pytest.mark.parametrize(
    ("spot", "per_hour", "on_demand", "quotas"),
    [
        (False, 7.346, 7.346, {"StandardNCADSA100v4Family": 48, "standardDSv5Family": 4, "cores": 52}),
        (True, 0.888, 7.346, {"LowPriorityCores": 48, "standardDSv5Family": 4, "cores": 4}),
        (
            "prefer",
            0.888,
            7.346,
            {"LowPriorityCores": 48, "StandardNCADSA100v4Family": 48, "standardDSv5Family": 4, "cores": 52},
        ),
    ],
)
def test_spot_has_a_separate_price_and_quota(
    spot: bool | str, per_hour: float, on_demand: float, quotas: dict[str, int]
) -> None:
    nodes = nodes_for(ClusterConfig(size=A100, nodes=2, spot=spot), ask=False)
    assert (nodes.nodes_usd_per_hour, nodes.nodes_usd_per_hour_on_demand) == (per_hour, on_demand)
    assert nodes.head_usd_per_hour == 0.192
    assert nodes.usd_per_hour == pytest.approx(per_hour + 0.192)
    assert {one.name: one.vcpus for one in nodes.quotas()} == quotas


@pytest.mark.parametrize(
    ("cluster", "missing"),
    [
        ({"size": A100}, []),
        ({"size": A100, "head_size": "D8s_v5"}, [r" Standard_D8s_v5 in eastus (?!.*\bin\b)"]),
        ({"size": "NCC40ads_H100_v5"}, [r" Standard_NCC40ads_H100_v5 in eastus .* in eastus2\."]),
        ({"size": "NC40ads_H100_v5", "spot": True}, [r"(?i)\bspot\b.* Standard_NC40ads_H100_v5 in eastus "]),
    ],
)
def test_unknown_prices_are_named(cluster: dict[str, object], missing: list[str]) -> None:
    nodes = nodes_for(ClusterConfig(**cluster), ask=False)  # type: ignore[arg-type]
    assert len(nodes.missing()) == len(missing)
    for note, quoted in zip(nodes.missing(), missing, strict=True):
        assert re.search(quoted, note), note
    assert (nodes.usd_per_hour is None) == bool(missing)


def test_the_head_is_a_small_vm_of_the_catalogue() -> None:
    for head in catalogue.heads().values():
        assert 2 <= head.vcpus <= 16
        assert head.quota_family
    with pytest.raises(ConfigError, match='"Standard_D4s_v5"') as caught:
        nodes_for(ClusterConfig(size=A100, head_size="Standard_D4s_v4"), ask=False)
    assert caught.value.key == "cluster.head_size"
