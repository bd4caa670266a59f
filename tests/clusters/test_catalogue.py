"""The catalogue of NC sizes, and its prices from a server that answers as Azure's public list does."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
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
    """An entry of the list in its documented shape."""
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
    ],
    [item(A100, 0.8, meter="NC24ads A100 v4 Spot"), item("Standard_NC_of_2030", 99.0)],
]


class PriceList:
    """A server on loopback. `pages`: what it answers, one list of items a page; `body`: these bytes in their place."""

    def __init__(self) -> None:
        self.pages, self.body, self.next_host, self.asked = PAGES, b"", "", [""]
        self.asked.clear()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.asked.append(self.path)
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


def test_every_size_is_whole() -> None:
    """A hole here would be a hole in a plan: what it costs, which quota it takes, whether it boots."""
    sizes = catalogue.sizes()
    for size in sizes.values():
        assert re.fullmatch(r"Standard_NC\w+", size.name)
        assert min(size.gpus, size.gpu_memory_gib, size.vcpus, size.memory_gib) > 0
        assert size.status in ("current", "preview", "retired")
        assert (size.retired is not None) == (size.status == "retired") == (size.successor is not None)
        assert size.successor is None or sizes[size.successor].status == "current"
        assert size.status == "retired" or (size.network_gbit and size.local_disk)
        for price in size.prices:
            assert price.usd_per_hour > 0
            assert price.source
            assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", price.date)
    assert {size.gpu for size in sizes.values() if size.gen2_only} == {"A100 PCIe", "H100 NVL", "RTX PRO 6000"}
    priced = {size.name for size in sizes.values() if size.status == "current" and size.prices}
    assert priced == {size.name for size in sizes.values() if size.status == "current"}


def test_where_sources_disagree_the_newer_price_counts() -> None:
    price = catalogue.find("NC48ads_A100_v4").price("eastus")
    assert price is not None
    assert (price.usd_per_hour, price.date) == (9.554, "2026-11-09")


@pytest.mark.parametrize("name", [A100, "NC24ads_A100_v4", "standard_nc24ADS_a100_v4"])
def test_a_size_is_found_as_people_write_it(name: str) -> None:
    assert catalogue.find(name).name == A100


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Standard_NC6s_v3", r"retired it on 2025-09-30\. Take Standard_NC24ads_A100_v4"),
        ("NC24rs_v3", "2025-03-31"),
        ("Standard_NC24ads_A10_v4", f'Did you mean "{A100}"'),
        ("Standard_D4s_v5", "no such size"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        catalogue.find(name)


def test_todays_prices_come_before_the_tables(server: PriceList) -> None:
    found = prices.refreshed(catalogue.sizes(), "eastus")
    on_demand, spot = found[A100].price("eastus"), found[A100].price("eastus", spot=True)
    assert on_demand is not None
    assert spot is not None
    assert (on_demand.usd_per_hour, on_demand.source) == (4.0, prices.SOURCE)  # not Windows', not another region's
    assert spot.usd_per_hour == 0.8  # not low priority's
    assert found["Standard_NC4as_T4_v3"].price("eastus") == catalogue.find("NC4as_T4_v3").price("eastus")
    first = parse_qs(urlsplit(server.asked[0]).query)["$filter"][0]
    assert "armRegionName eq 'eastus'" in first
    assert len(server.asked) == 2


def test_a_plan_has_todays_prices_of_nodes_and_head(server: PriceList) -> None:
    server.pages = [[*PAGES[0], item("Standard_D4s_v5", 0.2, productName="Virtual Machines Dsv5 Series")]]
    nodes = nodes_for(ClusterConfig(size=A100, nodes=2))
    assert (nodes.nodes_usd_per_hour, nodes.head_usd_per_hour, nodes.usd_per_hour) == (8.0, 0.2, 8.2)
    assert nodes.prices_from == "Prices of today from the Azure Retail Prices API, where it has them."
    assert "armSkuName eq 'Standard_D4s_v5'" in parse_qs(urlsplit(server.asked[0]).query)["$filter"][0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"<html>", "no JSON"), (b"[1]", "without a list"), (b'{"Items": [{"armSkuName": 3}]}', "not as documented")],
)
def test_an_answer_of_another_shape_is_not_believed(server: PriceList, body: bytes, expected: str) -> None:
    server.body = body
    with pytest.raises(prices.PricesUnavailable, match=expected):
        prices.refreshed(catalogue.sizes(), "eastus")


def test_a_page_cannot_send_us_elsewhere(server: PriceList) -> None:
    server.next_host = "127.0.0.1:9"
    with pytest.raises(prices.PricesUnavailable, match="another place"):
        prices.refreshed(catalogue.sizes(), "eastus")


def test_sizes_prints_the_catalogue(server: PriceList, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sizes", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows[A100]["usd_per_hour"], rows[A100]["spot_usd_per_hour"]) == (4.0, 0.8)
    assert rows["Standard_NC6s_v3"]["status"] == "retired"
    assert cli.run(["sizes"]) == 0
    printed = capsys.readouterr().out
    assert "Standard_NC64as_T4_v3" in printed
    assert "Prices of today" in printed
    assert "Retired 2025-03-31, take Standard_NC96ads_A100_v4: Standard_NC24rs_v3" in printed


def test_without_the_list_the_table_is_shown_with_its_dates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCH_PRICES_URL", "http://127.0.0.1:9/api")  # no process listens on the discard port
    assert cli.run(["sizes"]) == 0
    printed = capsys.readouterr().out
    assert "3.673 (2026-11-09)" in printed
    assert "127.0.0.1:9 does not answer" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--region", "east us"], "letters and digits"),
        (["cluster.size=NC24ads_A100_v4"], "takes no overrides"),
        (["--offline", "NC24ads"], "neither a verb nor an override"),
    ],
)
def test_what_sizes_does_not_take(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sizes", *words]) == 2
    assert expected in capsys.readouterr().err
