"""The sizes of Azure's NC series: what each holds, what its quota is counted by, and what it cost when.

The table itself is `nc_series.yaml`; `prices.py` asks Azure for today's prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import ConfigError, did_you_mean

_TABLE = Path(__file__).with_name("nc_series.yaml")
_PREFIX = "Standard_"


@dataclass(frozen=True)
class Price:
    """US dollars an hour for one VM with Linux. date: a day, or the month where the source gives no day."""

    region: str
    usd_per_hour: float
    spot: bool
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Vm:
    """A kind of VM. quota_family: what its vCPUs are counted by, a region at a time; spot has a pool of its own."""

    name: str
    vcpus: int
    memory_gib: int
    quota_family: str
    prices: tuple[Price, ...] = ()

    def price(self, region: str, spot: bool = False) -> Price | None:
        """Return the newest known price in a region; None where there is none."""
        found = [price for price in self.prices if (price.region, price.spot) == (region, spot)]
        return max(found, key=lambda price: price.date, default=None)


@dataclass(frozen=True, kw_only=True)
class Size(Vm):
    """One VM size of the NC series.

    Attributes:
        gpus, gpu, gpu_memory_gib: how many, which model, GiB each.
        pcie: the generation of a GPU's PCI Express slot, by the data sheet of its model.
        network_gbit: Gbit/s between VMs, or None where nothing is known. None of these sizes has InfiniBand.
        accelerated_networking: whether it can be switched on; Azure's default is off.
        local_disk: temporary disks, as Azure describes them.
        gen2_only: whether only generation 2 images boot.
        status: current, preview or retired; `retired` is the day, `successor` what to take instead.
    """

    gpus: int
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


V = TypeVar("V", bound=Vm)


@cache
def sizes() -> Mapping[str, Size]:
    """Return every size by its name, retired ones included, in the order of the table."""
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


@cache
def heads() -> Mapping[str, Vm]:
    """Return the VMs that a cluster's head may be, by name."""
    table = _table()
    return {name: Vm(name=name, **{**entry, "prices": _prices(entry, table)}) for name, entry in table["heads"].items()}


def find(name: str) -> Size:
    """Return the size of this name; `Standard_` may be left out, and case does not matter.

    Raises:
        ConfigError: there is none (names the nearest), or it is retired (names the day and the successor).
    """
    size = _named(name, sizes())
    if size is None:
        usable = [other.name for other in sizes().values() if other.status != "retired"]
        raise ConfigError(
            f"cluster.size={name}: there is no such size in the NC series.{did_you_mean(name, usable)} "
            "`launch sizes` lists them."
        )
    if size.status == "retired":
        raise ConfigError(
            f"cluster.size={size.name}: Azure retired it on {size.retired}. Take {size.successor} instead; "
            "`launch sizes` lists what there is."
        )
    return size


def find_head(name: str) -> Vm:
    """Return the VM of this name for a head. Raises ConfigError where the table has none."""
    head = _named(name, heads())
    if head is None:
        raise ConfigError(
            f"cluster.head_size={name}: the head is a small VM without a GPU, and this is none of those that launch "
            f"knows.{did_you_mean(name, heads())} There are {', '.join(heads())}."
        )
    return head


def _named(name: str, known: Mapping[str, V]) -> V | None:
    return {_short(other).lower(): vm for other, vm in known.items()}.get(_short(name).lower())


def _short(name: str) -> str:
    return name[len(_PREFIX) :] if name.lower().startswith(_PREFIX.lower()) else name


@cache
def _table() -> dict[str, Any]:
    import yaml

    table: dict[str, Any] = yaml.safe_load(_TABLE.read_text())
    return table


def _prices(entry: Mapping[str, Any], table: Mapping[str, Any]) -> tuple[Price, ...]:
    found = []
    for price in entry.get("prices", ()):
        source = table["sources"][price["source"]]
        found.append(Price(price["region"], price["usd_per_hour"], price["spot"], source["name"], str(source["date"])))
    return tuple(found)
