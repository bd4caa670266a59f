"""`launch sizes`: the catalogue of NC sizes with what they cost, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from launcher.clusters.pricing.catalogue import Price, Size

REGION = "eastus"


def known(region: str, ask: bool) -> tuple[Mapping[str, Size], str]:
    """Return the sizes, and one line about where their prices come from. ask: Azure's public list, if it answers."""
    from launcher.clusters.pricing.catalogue import sizes
    from launcher.clusters.pricing.prices import SOURCE, PricesUnavailable, refreshed

    shipped = sizes()
    if not ask:
        return shipped, "Prices from the table that launch ships; their dates stand beside them."
    try:
        return refreshed(shipped, region), f"Prices of today from the {SOURCE} where it has them, else with their date."
    except PricesUnavailable as error:
        return shipped, f"Prices from the table that launch ships, since today's could not be had: {error}."


def rows(found: Mapping[str, Size], region: str) -> list[dict[str, Any]]:
    """Return one mapping a size; `usd_per_hour` and `spot_usd_per_hour` are the newest of the region, or None."""
    return [
        {
            **dataclasses.asdict(size),
            "usd_per_hour": _dollars(size.price(region)),
            "spot_usd_per_hour": _dollars(size.price(region, spot=True)),
            "region": region,
        }
        for size in found.values()
    ]


def _dollars(price: Price | None) -> float | None:
    return None if price is None else price.usd_per_hour


def table(found: Mapping[str, Size], region: str, source: str) -> None:
    """Print the sizes that can be had, then the retired ones."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from launcher.clusters.pricing.catalogue import as_of

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"NC series, {region}", title_justify="left")
    for heading in ("size", "GPUs", "vCPU", "RAM GiB", "Gbit/s", "local disk", "USD/h", "spot", "quota family"):
        number = heading in ("vCPU", "RAM GiB", "Gbit/s", "USD/h", "spot")
        # A size's name is what people copy: it is never folded.
        grid.add_column(heading, justify="right" if number else "left", no_wrap=heading == "size", overflow="fold")
    for size in found.values():
        if size.status == "retired":
            continue
        grid.add_row(
            size.name,
            size.hardware,
            str(size.vcpus),
            str(size.memory_gib),
            "" if size.network_gbit is None else f"{size.network_gbit:g}",
            size.local_disk or "",
            _shown(size.price(region)),
            _shown(size.price(region, spot=True)),
            size.quota_family,
        )
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = 200  # a file is not as narrow as the terminal that rich assumes
    out.print(grid)
    for note, names in _notes(found).items():
        out.print(f"{note}: {', '.join(names)}", soft_wrap=True)
    out.print(f"Catalogue of {as_of()}. {source}", soft_wrap=True)


def _notes(found: Mapping[str, Size]) -> dict[str, list[str]]:
    """Return what has to be said of some sizes, with the sizes."""
    notes: dict[str, list[str]] = {}
    for size in found.values():
        if size.status == "retired":
            notes.setdefault(f"Retired {size.retired}, take {size.successor}", []).append(size.name)
        elif size.status != "current":
            notes.setdefault(size.status.capitalize(), []).append(size.name)
        if size.note:
            notes.setdefault(size.note[0].upper() + size.note[1:], []).append(size.name)
    return notes


def _shown(price: Price | None) -> str:
    return "" if price is None else f"{price.usd_per_hour:.3f} ({price.date})"
