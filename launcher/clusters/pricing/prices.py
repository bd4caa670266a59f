"""Today's prices from Azure's public list, which needs no login.

The Azure Retail Prices API (learn.microsoft.com, "Azure Retail Prices REST API overview"): a GET with an OData filter
answers pages of `Items` with `armSkuName`, `armRegionName`, `retailPrice`, `meterName` and `productName`.
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
_SECONDS = 4.0  # for one page; somebody waits
_MOST_PAGES = 20


class PricesUnavailable(Exception):
    """The list could not be had; says why in one line."""


def refreshed(sizes: Mapping[str, V], region: str) -> dict[str, V]:
    """Return the sizes (of the NC series, or other VMs) with today's prices of a region before those of the table.

    The address may be another one, LAUNCH_PRICES_URL.

    Raises:
        PricesUnavailable: the list does not answer, or answers something else.
    """
    today = date.today().isoformat()
    found: dict[str, list[Price]] = {}
    for item in _items(region, sizes):
        kept = _read(item, region, today)
        if kept is not None:
            found.setdefault(kept[0].lower(), []).append(kept[1])
    return {name: replace(size, prices=(*found.get(name.lower(), ()), *size.prices)) for name, size in sizes.items()}


def _read(item: Any, region: str, today: str) -> tuple[str, Price] | None:
    """Return (size, price) of an item; None for Windows, for low priority (the old spot) and for other regions."""
    try:
        name, meter, product = str(item["armSkuName"]), str(item["meterName"]), str(item["productName"])
        if item["armRegionName"] != region or item["unitOfMeasure"] != "1 Hour" or item["type"] != "Consumption":
            return None
        usd = float(item["retailPrice"])
    except (KeyError, TypeError, ValueError) as error:
        raise PricesUnavailable(f"an item of the list is not as documented ({type(error).__name__}: {error})") from None
    if "Windows" in product or meter.endswith("Low Priority") or not usd > 0:
        return None
    return name, Price(region, usd, meter.endswith("Spot"), SOURCE, today)


def _items(region: str, names: Iterable[str]) -> Iterator[Any]:
    others = [f"armSkuName eq '{name}'" for name in names if not name.startswith("Standard_NC")]
    wanted = " or ".join(["contains(armSkuName, 'Standard_NC')", *others])
    address = os.environ.get("LAUNCH_PRICES_URL", ADDRESS)
    conditions = (
        "serviceName eq 'Virtual Machines'",
        "priceType eq 'Consumption'",
        f"armRegionName eq '{region}'",
        f"({wanted})",
    )
    page: str | None = f"{address}?{urlencode({'currencyCode': 'USD', '$filter': ' and '.join(conditions)})}"
    for _ in range(_MOST_PAGES):
        if page is None:
            return
        if urlsplit(page)[:2] != urlsplit(address)[:2]:  # an answer does not choose whom we ask next
            raise PricesUnavailable(f"the list refers to another place, {urlsplit(page).netloc}")
        answer = _get(page)
        yield from answer["Items"]
        page = answer.get("NextPageLink") or None


def _get(page: str) -> dict[str, Any]:
    if urlsplit(page).scheme not in ("http", "https"):
        raise PricesUnavailable(f"{page} is no address of a web server")
    try:
        with urlopen(page, timeout=_SECONDS) as response:
            answer = json.load(response)
    except (URLError, OSError) as error:
        raise PricesUnavailable(f"{urlsplit(page).netloc} does not answer ({error})") from None
    except ValueError:
        raise PricesUnavailable(f"{urlsplit(page).netloc} answers something that is no JSON") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("Items"), list):
        raise PricesUnavailable(f"{urlsplit(page).netloc} answers without a list of items")
    return answer
