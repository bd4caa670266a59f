"""The catalogue of VM sizes of Azure's NC series: hardware, quota family, and dated prices.

The data is in `nc_series.yaml`. `prices.py` queries Azure for today's prices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from launcher.errors import ConfigError, did_you_mean

_TABLE = Path(__file__).with_name("nc_series.yaml")
_PREFIX = "Standard_"


@dataclass(frozen=True)
class Price:
    """The price of one Linux VM in US dollars per hour. date: a day, or a month if the source has no day."""

    region: str
    usd_per_hour: float
    spot: bool
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Vm:
    """A VM size. quota_family: the quota that limits its vCPUs in a region; spot VMs have a separate quota."""

    name: str
    vcpus: int
    memory_gib: int
    quota_family: str
    prices: tuple[Price, ...] = ()

    def price(self, region: str, spot: bool = False) -> Price | None:
        """Return the newest known price in a region, or None."""
        found = [price for price in self.prices if (price.region, price.spot) == (region, spot)]
        return max(found, key=lambda price: price.date, default=None)


@dataclass(frozen=True, kw_only=True)
class Size(Vm):
    """A VM size of the NC series.

    Attributes:
        gpus: the number of GPUs; 0.25 or 0.5 for sizes with a fraction of a GPU.
        gpu, gpu_memory_gib: the GPU model, and the memory of a whole GPU in GiB.
        pcie: the generation of a GPU's PCI Express slot, from the data sheet of the model.
        network_gbit: the bandwidth between VMs in Gbit/s, or None if unknown. None of these sizes has InfiniBand.
        accelerated_networking: whether it is supported; Azure's default is off.
        local_disk: the temporary disks, as Azure describes them.
        gen2_only: whether the size boots only generation 2 images.
        status: current, preview or retired.
        retired: the date of the retirement.
        successor: the size to use instead of a retired one.
        note: a fact that users of the size must know.
        driver: the special GPU driver that the size needs, or None. With a datacenter driver its GPUs are not usable.
        aks: whether AKS and Batch support node pools of the size.
    """

    gpus: float
    gpu: str
    gpu_memory_gib: int
    pcie: int
    network_gbit: float | None
    accelerated_networking: bool
    local_disk: str | None
    gen2_only: bool
    status: str
    retired: str | None = None
    successor: str | None = None
    note: str | None = None
    driver: str | None = None
    aks: bool = True

    @property
    def devices(self) -> int:
        """Return the number of GPU devices in the VM. A fraction of a GPU is one device."""
        return math.ceil(self.gpus)

    @property
    def device_memory_gib(self) -> float:
        """Return the memory of each GPU device in GiB."""
        return self.gpu_memory_gib * self.gpus / self.devices

    @property
    def hardware(self) -> str:
        """Return the GPUs for messages, such as `4 x A100 PCIe 80 GiB` or `1/4 x RTX PRO 6000 96 GiB`."""
        return f"{Fraction(self.gpus)} x {self.gpu} {self.gpu_memory_gib} GiB"


V = TypeVar("V", bound=Vm)


@cache
def sizes() -> Mapping[str, Size]:
    """Return all sizes by name, including retired ones, in the order of the table."""
    table = _table()
    return {
        name: Size(
            name=name,
            **{
                **entry,
                "local_disk": entry.get("local_disk"),
                "retired": str(entry["retired"]) if "retired" in entry else None,
                "prices": _prices(entry, table),
            },
        )
        for name, entry in table["sizes"].items()
    }


def as_of() -> str:
    """Return the date of the catalogue, that of its newest source."""
    return str(_table()["as_of"])


@cache
def heads() -> Mapping[str, Vm]:
    """Return the sizes that the head of a cluster may have, by name."""
    table = _table()
    return {name: Vm(name=name, **{**entry, "prices": _prices(entry, table)}) for name, entry in table["heads"].items()}


def find(name: str) -> Size:
    """Return the size with this name. The prefix `Standard_` is optional, and case does not matter.

    Raises:
        ConfigError: the size does not exist (names the most similar one), or is retired (names date and successor).
    """
    size = _named(name, sizes())
    if size is None:
        usable = [other.name for other in sizes().values() if other.status != "retired"]
        raise ConfigError(
            f"cluster.size={name} is not a size of the NC series.{did_you_mean(name, usable)} `launch sizes` lists all "
            "sizes.",
            key="cluster.size",
        )
    if size.status == "retired":
        raise ConfigError(
            f"cluster.size={size.name}: Azure retired this size on {size.retired}. Use {size.successor} instead; "
            "`launch sizes` lists all sizes.",
            key="cluster.size",
        )
    return size


def find_head(name: str) -> Vm:
    """Return the head size with this name. Raises ConfigError if the catalogue has none."""
    head = _named(name, heads())
    if head is None:
        raise ConfigError(
            f"cluster.head_size={name} is not a known size for the head, which is a small VM without a GPU."
            f"{did_you_mean(name, heads())} Known sizes: {', '.join(heads())}.",
            key="cluster.head_size",
        )
    return head


def _named(name: str, known: Mapping[str, V]) -> V | None:
    return {_short(other).lower(): vm for other, vm in known.items()}.get(_short(name).lower())


def _short(name: str) -> str:
    return name[len(_PREFIX) :] if name.lower().startswith(_PREFIX.lower()) else name


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(_TABLE.read_text())
    return table


def _prices(entry: Mapping[str, Any], table: Mapping[str, Any]) -> tuple[Price, ...]:
    found = []
    for price in entry.get("prices", ()):
        source = table["sources"][price["source"]]
        found.append(Price(price["region"], price["usd_per_hour"], price["spot"], source["name"], str(source["date"])))
    return tuple(found)
