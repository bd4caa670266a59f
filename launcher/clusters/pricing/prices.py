"""Query today's prices from Azure's public price list, which needs no login.

The Azure Retail Prices API (learn.microsoft.com, "Azure Retail Prices REST API overview"): a GET request with an OData
filter returns pages of `Items` with `armSkuName`, `armRegionName`, `retailPrice`, `meterName`, `productName`,
`effectiveStartDate` and, for prices that have ended, `effectiveEndDate`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import date
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

from launcher.clusters.pricing.catalogue import Price, V

ADDRESS = "https://prices.azure.com/api/retail/prices"
SOURCE = "Azure Retail Prices API"
_SECONDS = 4.0  # for one page; the user waits for it
_MAX_PAGES = 20
_PLACEHOLDER = 0.01  # US dollars; the list has such prices for sizes that are not sold yet


class PricesUnavailable(Exception):
    """The price list does not answer, or its response is invalid. The message is one line without a final period."""


def refreshed(sizes: Mapping[str, V], region: str) -> dict[str, V]:
    """Return VM sizes with today's prices of a region in addition to those of the catalogue.

    The environment variable LAUNCH_PRICES_URL overrides the address of the list.

    Args:
        sizes: sizes of the NC series or others, by name.
        region: the name of an Azure region.

    Raises:
        PricesUnavailable: the list does not answer, or its response is invalid.
    """
    today = date.today().isoformat()
    newest: dict[tuple[str, bool], tuple[str, Price]] = {}  # (size, spot) -> start of the validity, and price
    for item in _items(region, sizes):
        entry = _read(item, region, today)
        if entry is None:
            continue
        name, start, price = entry
        key = (name.lower(), price.spot)
        if key not in newest or newest[key][0] < start:
            newest[key] = (start, price)
    return {
        name: replace(
            size, prices=(*(price for (own, _), (_, price) in newest.items() if own == name.lower()), *size.prices)
        )
        for name, size in sizes.items()
    }


def _read(item: Any, region: str, today: str) -> tuple[str, str, Price] | None:
    """Return size, start of the validity and price of an item, or None.

    None for prices that are not valid today, for placeholders, for Windows, for low priority (the predecessor of spot)
    and for other regions.
    """
    try:
        name, meter, product = str(item["armSkuName"]), str(item["meterName"]), str(item["productName"])
        if item["armRegionName"] != region or item["unitOfMeasure"] != "1 Hour" or item["type"] != "Consumption":
            return None
        usd = float(item["retailPrice"])
        start, end = str(item["effectiveStartDate"])[:10], str(item.get("effectiveEndDate") or "9999")[:10]
    except (KeyError, TypeError, ValueError) as error:
        raise PricesUnavailable(f"an item of the list is invalid ({type(error).__name__}: {error})") from None
    if "Windows" in product or meter.endswith("Low Priority") or usd <= _PLACEHOLDER or not start <= today < end:
        return None
    return name, start, Price(region, usd, meter.endswith("Spot"), SOURCE, today)


def _items(region: str, names: Iterable[str]) -> Iterator[Any]:
    others = [f"armSkuName eq '{name}'" for name in names if not name.startswith("Standard_NC")]
    sizes = " or ".join(["contains(armSkuName, 'Standard_NC')", *others])
    address = os.environ.get("LAUNCH_PRICES_URL", ADDRESS)
    conditions = (
        "serviceName eq 'Virtual Machines'",
        "priceType eq 'Consumption'",
        f"armRegionName eq '{region}'",
        f"({sizes})",
    )
    page: str | None = f"{address}?{urlencode({'currencyCode': 'USD', '$filter': ' and '.join(conditions)})}"
    for _ in range(_MAX_PAGES):
        if page is None:
            return
        if urlsplit(page)[:2] != urlsplit(address)[:2]:  # a response must not redirect us to another host
            raise PricesUnavailable(f"the list links to another host, {urlsplit(page).netloc}")
        answer = _get(page)
        yield from answer["Items"]
        page = answer.get("NextPageLink") or None


def _get(page: str) -> dict[str, Any]:
    if urlsplit(page).scheme not in ("http", "https"):
        raise PricesUnavailable(f"{page} is not an HTTP URL")
    try:
        with urlopen(page, timeout=_SECONDS) as response:
            answer = json.load(response)
    except (URLError, OSError) as error:
        raise PricesUnavailable(f"{urlsplit(page).netloc} does not answer ({error})") from None
    except ValueError:
        raise PricesUnavailable(f"{urlsplit(page).netloc} did not return JSON") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("Items"), list):
        raise PricesUnavailable(f"{urlsplit(page).netloc} returned no list of items")
    return answer
