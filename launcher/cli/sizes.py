"""`launch sizes`: the catalogue of Azure NC sizes with their prices, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from launcher.cli.line import Line
from launcher.cli.output import say
from launcher.cli.tables import ResultConsole
from launcher.clusters.pricing import catalogue
from launcher.clusters.pricing.catalogue import Price, Size
from launcher.clusters.pricing.prices import SOURCE, PricesUnavailable, refreshed
from launcher.errors import ConfigError

REGION = "eastus"


def sizes(line: Line) -> int:
    """Run `launch sizes`."""
    if line.words:
        raise ConfigError(
            f'launch sizes takes no overrides, but found "{line.words[0]}". --region NAME chooses a region.'
        )
    region = line.flags.get("region", REGION)
    if not region.isalnum():
        raise ConfigError(
            f"--region {region}: the name of an Azure region is letters and digits, such as eastus.", key="--region"
        )
    found, source = known(region.lower(), ask="offline" not in line.flags)
    if "json" in line.flags:
        say(source)
        print(json.dumps(rows(found, region.lower()), indent=2))
    else:
        print_table(found, region.lower(), source)
    return 0


def known(region: str, ask: bool) -> tuple[Mapping[str, Size], str]:
    """Return the sizes by name, and one line about the source of their prices.

    Args:
        ask: fetch today's prices from Azure's public price list, if it responds.
    """
    shipped = catalogue.sizes()
    if not ask:
        return shipped, "Prices are from the table that launch ships, each with its date."
    try:
        return refreshed(shipped, region), f"Prices of today are from the {SOURCE}; others have their date."
    except PricesUnavailable as error:
        return shipped, f"Prices are from the table that launch ships, because today's are unavailable: {error}."


def rows(found: Mapping[str, Size], region: str) -> list[dict[str, Any]]:
    """Return one mapping for each size. `usd_per_hour` and `spot_usd_per_hour` are the region's newest, or None."""
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


def print_table(found: Mapping[str, Size], region: str, source: str) -> None:
    """Print the available sizes as a table, then the retired ones."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"NC series, {region}", title_justify="left")
    for heading in ("size", "GPUs", "vCPU", "RAM GiB", "Gbit/s", "local disk", "USD/h", "spot", "quota family"):
        number = heading in ("vCPU", "RAM GiB", "Gbit/s", "USD/h", "spot")
        # Names of sizes are copied from the table, so they are never folded.
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
    out = ResultConsole(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = 200  # rich assumes 80 columns for a file
    out.print(grid)
    for note, names in _notes(found).items():
        out.print(f"{note}: {', '.join(names)}", soft_wrap=True)
    out.print(f"Catalogue of {catalogue.as_of()}. {source}", soft_wrap=True)


def _notes(found: Mapping[str, Size]) -> dict[str, list[str]]:
    """Return notes about sizes -> the names of the sizes that they apply to."""
    notes: dict[str, list[str]] = {}
    for size in found.values():
        if size.status == "retired":
            notes.setdefault(f"Retired {size.retired}, use {size.successor}", []).append(size.name)
        elif size.status != "current":
            notes.setdefault(size.status.capitalize(), []).append(size.name)
        if size.note:
            notes.setdefault(size.note[0].upper() + size.note[1:], []).append(size.name)
    return notes


def _shown(price: Price | None) -> str:
    return "" if price is None else f"{price.usd_per_hour:.3f} ({price.date})"
