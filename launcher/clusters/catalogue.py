"""The sizes of Azure's NC series: what each holds, what its quota is counted by, and what it cost when.

The table itself is `nc_series.yaml`; `prices.py` asks Azure for today's prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Size:
    """One VM size.

    Attributes:
        gpus, gpu, gpu_memory_gib: how many, which model, GiB each.
        vcpus, memory_gib: of the VM.
        network_gbit: Gbit/s between VMs, or None where nothing is known. None of these sizes has InfiniBand.
        accelerated_networking: whether it can be switched on; Azure's default is off.
        local_disk: temporary disks, as Azure describes them.
        quota_family: what cores are counted by, a region at a time; spot has a pool of its own.
        gen2_only: whether only generation 2 images boot.
        status: current, preview or retired; `retired` is the day, `successor` what to take instead.
    """

    name: str
    gpus: int
    gpu: str
    gpu_memory_gib: int
    vcpus: int
    memory_gib: int
    network_gbit: float | None
    accelerated_networking: bool
    local_disk: str | None
    quota_family: str
    gen2_only: bool
    status: str
    retired: str | None = None
    successor: str | None = None
    note: str | None = None
    prices: tuple[Price, ...] = ()

    def price(self, region: str, spot: bool = False) -> Price | None:
        """Return the newest known price in a region; None where there is none."""
        found = [price for price in self.prices if (price.region, price.spot) == (region, spot)]
        return max(found, key=lambda price: price.date, default=None)


@cache
def sizes() -> Mapping[str, Size]:
    """Return every size by its name, retired ones included, in the order of the table."""
    import yaml

    table = yaml.safe_load(_TABLE.read_text())
    sources = {key: (source["name"], str(source["date"])) for key, source in table["sources"].items()}
    return {name: _size(name, entry, sources) for name, entry in table["sizes"].items()}


def find(name: str) -> Size:
    """Return the size of this name; `Standard_` may be left out, and case does not matter.

    Raises:
        ConfigError: there is none (names the nearest), or it is retired (names the day and the successor).
    """
    known = {_short(other).lower(): size for other, size in sizes().items()}
    size = known.get(_short(name).lower())
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


def _short(name: str) -> str:
    return name[len(_PREFIX) :] if name.lower().startswith(_PREFIX.lower()) else name


def _size(name: str, entry: Mapping[str, Any], sources: Mapping[str, tuple[str, str]]) -> Size:
    plain = {**entry, "local_disk": entry.get("local_disk")}
    plain["retired"] = str(entry["retired"]) if "retired" in entry else None
    plain["prices"] = tuple(
        Price(price["region"], price["usd_per_hour"], price["spot"], *sources[price["source"]])
        for price in entry.get("prices", ())
    )
    return Size(name=name, **plain)
