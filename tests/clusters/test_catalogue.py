"""The catalogue of NC sizes, and today's prices from a fake of Azure's public price list."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from launcher import cli
from launcher.clusters.pricing import catalogue, prices
from launcher.clusters.pricing.nodes import nodes_for
from launcher.config.schema import ClusterConfig
from launcher.errors import ConfigError
from tests.support.servers import HttpServer


def item(name: str, usd: float, meter: str = "", **more: Any) -> dict[str, Any]:
    """Return an entry of the price list, in the documented format."""
    return {
        "currencyCode": "USD",
        "tierMinimumUnits": 0.0,
        "retailPrice": usd,
        "unitPrice": usd,
        "armRegionName": "eastus",
        "location": "US East",
        "effectiveStartDate": "2024-01-01T00:00:00Z",
        "meterName": meter or name.removeprefix("Standard_").replace("_", " "),
        "productName": "Virtual Machines NCADS A100 v4 Series",
        "serviceName": "Virtual Machines",
        "unitOfMeasure": "1 Hour",
        "type": "Consumption",
        "isPrimaryMeterRegion": True,
        "armSkuName": name,
        **more,
    }


A100 = "Standard_NC24ads_A100_v4"
PAGES: list[list[dict[str, Any]]] = [
    [
        item(A100, 4.0),
        item(A100, 7.0, productName="Virtual Machines NCADS A100 v4 Series Windows"),
        item(A100, 0.9, meter="NC24ads A100 v4 Low Priority"),
        item(A100, 3.0, armRegionName="westus3"),
        item(A100, 9.0, effectiveStartDate="2020-01-01T00:00:00Z", effectiveEndDate="2023-12-31T23:59:59Z"),
        item(A100, 8.0, effectiveStartDate="2999-01-01T00:00:00Z"),
        item(A100, 6.0, effectiveStartDate="2021-01-01T00:00:00Z"),
        item(A100, 0.002, effectiveStartDate="2025-01-01T00:00:00Z"),
    ],
    [item(A100, 0.8, meter="NC24ads A100 v4 Spot"), item("Standard_NC_of_2030", 99.0)],
]


class PriceList:
    """A server on loopback. pages: one list of items per page; body: if not empty, the response to every request."""

    def __init__(self) -> None:
        self.pages, self.body, self.next_host = PAGES, b"", ""
        self.requests: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests.append(self.path)
                page = int(parse_qs(urlsplit(self.path).query).get("page", ["0"])[0])
                last = page + 1 == len(owner.pages)
                link = None if last else f"http://{owner.next_host or owner.host}/api/retail/prices?page={page + 1}"
                answer = {"BillingCurrency": "USD", "Items": owner.pages[page], "NextPageLink": link, "Count": 1}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(owner.body or json.dumps(answer).encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = HttpServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PriceList]:
    running = PriceList()
    monkeypatch.setenv("LAUNCH_PRICES_URL", f"http://{running.host}/api/retail/prices")
    yield running
    running.close()


def test_every_size_is_complete() -> None:
    """A missing value would be missing in a plan: the cost, the quota, or whether the VM boots."""
    sizes = catalogue.sizes()
    for size in sizes.values():
        assert re.fullmatch(r"Standard_NC\w+", size.name)
        assert min(size.gpus, size.gpu_memory_gib, size.vcpus, size.memory_gib) > 0
        assert size.status in ("current", "preview", "retired")
        assert (size.retired is not None) == (size.status == "retired") == (size.successor is not None)
        assert size.successor is None or sizes[size.successor].status == "current"
        assert size.status == "retired" or size.driver or (size.network_gbit and size.local_disk)
        assert 0 < size.device_memory_gib <= size.gpu_memory_gib
        for price in size.prices:
            assert price.usd_per_hour > 0
            assert price.source
            assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", price.date)
    assert {size.gpu for size in sizes.values() if size.gen2_only} == {"A10", "A100 PCIe", "H100 NVL", "RTX PRO 6000"}
    current = [size for size in sizes.values() if size.status == "current" and not size.driver]
    assert [size.name for size in current if not size.prices] == []
    dates = [price.date for size in sizes.values() for price in size.prices]
    assert max(dates) <= f"{catalogue.as_of()}~", "the date of the catalogue is older than a price"


def facts() -> list[dict[str, str]]:
    """Return the rows of the table of facts."""
    lines = [line for line in Path(__file__).with_name("nc_series.md").read_text().splitlines() if line[:1] == "|"]
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heading, row, strict=True)) for row in rows]


def priced(size: catalogue.Size, spot: bool) -> str:
    """Return the price of a size as the table writes it."""
    for region in ("eastus", *(price.region for price in size.prices)):
        if price := size.price(region, spot):
            prefix = "" if region == "eastus" else f"{region} "
            return f"{prefix}{price.usd_per_hour:g}"
    return "-"


@pytest.mark.parametrize("row", facts(), ids=lambda row: row["size"])
def test_the_catalogue_agrees_with_the_table_of_facts(row: dict[str, str]) -> None:
    size = catalogue.sizes()[f"Standard_{row['size']}"]
    found = {
        "GPUs": str(Fraction(size.gpus)),
        "GPU": size.gpu,
        "GiB each": str(size.gpu_memory_gib),
        "vCPU": str(size.vcpus),
        "RAM GiB": str(size.memory_gib),
        "Gbit/s": "-" if size.network_gbit is None else f"{size.network_gbit:g}",
        "quota family": size.quota_family,
    }
    assert {key: row[key] for key in found} == found
    for key, spot in (("on demand", False), ("spot", True)):
        expected = re.sub(r"[\d.]+$", lambda number: f"{float(number[0]):g}", row[key])
        assert priced(size, spot) == expected
    status = row["status"]
    assert (size.status == "retired") == status.startswith("retired")
    assert size.retired is None or size.retired in status
    assert (size.driver is not None) == ("GRID" in status)
    assert size.aks == ("no AKS" not in status)


def test_the_catalogue_has_no_usable_size_that_the_table_lacks() -> None:
    known = {f"Standard_{row['size']}" for row in facts()}
    assert {size.name for size in catalogue.sizes().values() if size.status != "retired"} <= known


def test_a_fraction_of_a_gpu_is_one_device_with_a_part_of_the_memory() -> None:
    quarter, two = catalogue.find("NC24lds_xl_RTXPRO6000BSE_v6"), catalogue.find("NC288ds_xl_RTXPRO6000BSE_v6")
    assert (quarter.devices, quarter.device_memory_gib, quarter.hardware) == (1, 24.0, "1/4 x RTX PRO 6000 96 GiB")
    assert (two.devices, two.device_memory_gib) == (2, 96.0)


def test_the_newest_of_several_known_prices_applies() -> None:
    price = catalogue.find("NC48ads_A100_v4").price("eastus")
    assert price is not None
    assert (price.usd_per_hour, price.date) == (9.554, "2026-11-09")


@pytest.mark.parametrize("name", [A100, "NC24ads_A100_v4", "standard_nc24ADS_a100_v4"])
def test_sizes_are_found_in_any_spelling(name: str) -> None:
    assert catalogue.find(name).name == A100


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Standard_NC6s_v3", r"2025-09-30\. .*Standard_NC24ads_A100_v4"),
        ("NC24rs_v3", "2025-03-31"),
        ("Standard_NC24adsA100_v4", f'"{A100}"'),
        ("NC128ds_xl_RTXPRO6000BSE_v6", "Standard_NC144ds_xl_RTXPRO6000BSE_v6"),
        ("Standard_D4s_v5", "Standard_D4s_v5(?!.*20)"),
    ],
)
def test_unavailable_sizes_are_rejected_with_an_alternative(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        catalogue.find(name)
    assert caught.value.key == "cluster.size"


def test_todays_prices_precede_those_of_the_catalogue(server: PriceList) -> None:
    found = prices.refreshed(catalogue.sizes(), "eastus")
    on_demand, spot = found[A100].price("eastus"), found[A100].price("eastus", spot=True)
    assert on_demand is not None
    assert spot is not None
    # Windows, another region, an old, a future and a placeholder price are ignored.
    assert (on_demand.usd_per_hour, on_demand.source) == (4.0, prices.SOURCE)
    assert spot.usd_per_hour == 0.8  # not low priority
    assert found["Standard_NC4as_T4_v3"].price("eastus") == catalogue.find("NC4as_T4_v3").price("eastus")
    first = parse_qs(urlsplit(server.requests[0]).query)["$filter"][0]
    assert "armRegionName eq 'eastus'" in first
    assert len(server.requests) == 2


def test_a_plan_has_todays_prices_of_nodes_and_head(server: PriceList) -> None:
    server.pages = [[*PAGES[0], item("Standard_D4s_v5", 0.2, productName="Virtual Machines Dsv5 Series")]]
    nodes = nodes_for(ClusterConfig(size=A100, nodes=2))
    assert (nodes.nodes_usd_per_hour, nodes.head_usd_per_hour, nodes.usd_per_hour) == (8.0, 0.2, 8.2)
    assert "Azure Retail Prices API" in nodes.prices_from
    assert catalogue.as_of() not in nodes.prices_from
    assert "armSkuName eq 'Standard_D4s_v5'" in parse_qs(urlsplit(server.requests[0]).query)["$filter"][0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"<html>", r"\bJSON\b"), (b"[1]", r"^(?!.*JSON).*\w"), (b'{"Items": [{"armSkuName": 3}]}', r"^(?!.*JSON).*\w")],
)
def test_invalid_responses_are_rejected(server: PriceList, body: bytes, expected: str) -> None:
    server.body = body
    with pytest.raises(prices.PricesUnavailable, match=expected):
        prices.refreshed(catalogue.sizes(), "eastus")


def test_a_page_cannot_redirect_to_another_host(server: PriceList) -> None:
    server.next_host = "127.0.0.1:9"
    with pytest.raises(prices.PricesUnavailable, match=r"127\.0\.0\.1:9"):
        prices.refreshed(catalogue.sizes(), "eastus")


def test_sizes_prints_the_catalogue(server: PriceList, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sizes", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows[A100]["usd_per_hour"], rows[A100]["spot_usd_per_hour"]) == (4.0, 0.8)
    assert rows["Standard_NC6s_v3"]["status"] == "retired"
    assert cli.run(["sizes"]) == 0
    printed = capsys.readouterr().out
    assert "Standard_NC64as_T4_v3" in printed
    assert "Azure Retail Prices API" in printed
    assert re.search(r" 2025-03-31, \w+ Standard_NC96ads_A100_v4: Standard_NC24rs_v3\b", printed)


def test_without_the_price_list_the_catalogue_is_shown_with_dates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_PRICES_URL", "http://127.0.0.1:9/api")  # no process listens on the discard port
    assert cli.run(["sizes"]) == 0
    printed = capsys.readouterr().out
    assert "3.673 (2026-11-09)" in printed
    assert f" {catalogue.as_of()}" in printed
    assert "1/4 x RTX PRO 6000" in printed
    assert "127.0.0.1:9 " in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--region", "east us"], "--region east us"),
        (["cluster.size=NC24ads_A100_v4"], '"cluster.size=NC24ads_A100_v4"'),
        (["--offline", "NC24ads"], '"NC24ads"'),
    ],
)
def test_invalid_arguments_of_sizes(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sizes", *words]) == 2
    assert expected in capsys.readouterr().err
