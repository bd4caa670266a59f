"""TensorBoard in a real browser: `launch board` shows the curves, text, graph and HParams of runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, sync_playwright

from launcher.engine.event_file import EventFile
from tests.support.waiting import wait_for

LAUNCH = [sys.executable, "-m", "launcher"]
SECONDS = 60_000  # a page on a busy machine, in Playwright's milliseconds
RATE = 0.002
RUN = "digits"
RESUMED = "resumed"  # the same run, killed after step 8 and continued


def _launch(cwd: Path, *words: str) -> None:
    done = subprocess.run([*LAUNCH, *words], cwd=cwd, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class WrittenSweep:
    """A sweep of which only the event files are written, as its trials would write them."""

    name: str
    values: list[dict[str, Any]]
    objective: str = "val/accuracy"

    def write(self, root: Path) -> None:
        for number, values in enumerate(self.values):
            file = EventFile(root / self.name / str(number), None)
            file.layout(["loss", "accuracy"])
            file.hyperparameters(values, [self.objective])
            for step in (1, 2):
                loss = {"train/loss": 1 / step, "val/loss": 2 / step}
                file.scalars({**loss, "val/accuracy": 0.9 - number / 50, "cluster/workers": 1.0}, step)
            file.close(True)
        best = {"tag": self.objective, "value": 0.9, "step": 2}
        (root / self.name / "result.json").write_text(json.dumps({"status": "completed", "best": best}))


# The values of vars.note are numbers in one sweep and texts in the other, because one of them is null.
NOTES = WrittenSweep("notes", [{"vars.note": number, "optimizer.lr": 0.1} for number in range(3, 14)])
NEWEST = WrittenSweep("newest", [{"vars.note": note, "model.width": 8.0} for note in ("null", "3")])
TRIALS = [f"{sweep.name}/{number:03}" for sweep in (NEWEST, NOTES) for number in range(len(sweep.values))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run root with a run of 20 steps, a copy that lost the steps after 8 and was resumed, and two sweeps."""
    cwd = tmp_path_factory.mktemp("project")
    root = cwd / "runs"
    _launch(
        cwd,
        *("experiment=mnist_tiny", "cluster=none", f"run.name={RUN}", f"optimizer.lr={RATE}", "trainer.epochs=2"),
        *("checkpoint.every=8", "checkpoint.keep=9", "logging.hparams=[optimizer.lr]"),
    )
    shutil.copytree(root / RUN, root / RESUMED)
    for checkpoint in (root / RESUMED / "checkpoints").iterdir():
        if checkpoint.name != "step-00000008":
            shutil.rmtree(checkpoint)
    (root / RESUMED / ".heartbeat").unlink()
    result = root / RESUMED / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "status": "running"}))
    _launch(cwd, f"run.name={RESUMED}", "run.resume=true")
    for sweep in (NOTES, NEWEST):
        sweep.write(root)
    return root


@dataclass
class Board:
    """Return a TensorBoard server with a browser.

    Attributes:
        first_page: the end of the printed address.
        foreign: the requests to other machines.
    """

    url: str
    first_page: str
    browser: Browser
    foreign: list[str] = field(default_factory=list)

    def open(self, place: str) -> Page:
        page = self.browser.new_page(viewport={"width": 1500, "height": 1800})
        page.set_default_timeout(SECONDS)
        page.route("**/*", self._guard)
        page.goto(self.url + place)
        return page

    def ask(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def _guard(self, route: Route) -> None:
        if urllib.parse.urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()


@pytest.fixture(scope="module")
def board(root: Path, chromium: str) -> Iterator[Board]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*LAUNCH, "board", f"run.root={root}", "--port", str(port)]
    server = subprocess.Popen(command, cwd=root.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        printed = next(word for word in server.stderr.readline().split() if word.startswith("http://"))
        url, query, first_page = printed.partition("?")
        _wait_for(url, server)
        # Chromium's sandbox needs a user namespace, which root in a container does not have.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=options)
            yield Board(url, query + first_page, browser)
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=240)


def _wait_for(url: str, server: subprocess.Popen[str]) -> None:
    """Wait until TensorBoard responds and has read all runs."""

    def has_read() -> bool:
        assert server.poll() is None, server.stderr.read() if server.stderr else ""
        try:
            with urllib.request.urlopen(f"{url}data/runs", timeout=60) as answer:
                return len(json.load(answer)) >= 2 + len(TRIALS)
        except OSError:
            return False

    wait_for(has_read, 90, "TensorBoard does not list all runs")


def _last(root: Path, tag: str) -> float:
    entries = [json.loads(line) for line in (root / RUN / "metrics.jsonl").read_text().splitlines()]
    return [entry[tag] for entry in entries if tag in entry][-1]


def test_the_printed_address_shows_the_losses_and_the_monitored_tag_first(board: Board, root: Path) -> None:
    page = board.open(board.first_page)
    pinned = page.locator("metrics-pinned-view card-view")
    pinned.nth(2).wait_for()
    titles = [pinned.nth(number).locator("[title]").first.get_attribute("title") for number in range(pinned.count())]
    assert titles == ["train/loss", "val/loss", "val/accuracy"]
    for number, tag in enumerate(("train/loss", "val/loss")):
        card = pinned.nth(number)
        # The table below the chart has one row for each run, with its last value as TensorBoard rounds it.
        value = f"{_last(root, tag):.4f}".rstrip("0").rstrip(".")
        card.get_by_text(RUN, exact=True).first.wait_for()
        card.get_by_text(value, exact=True).first.wait_for()
        page.wait_for_timeout(1500)  # the line is drawn after the table, on a canvas without an event for its end
        assert _colourful(card.locator(".series-view").screenshot()) > 50, f"no line is drawn for {tag}"
    assert board.foreign == []


def test_runs_are_in_the_order_of_their_numbers(board: Board) -> None:
    page = board.open("#timeseries")
    listed = page.locator("runs-data-table tb-data-table-content-row")
    listed.nth(len(TRIALS)).wait_for()
    names = [text.strip() for text in listed.all_inner_texts()]
    assert [name for name in names if "/" in name] == TRIALS


def test_custom_scalars_show_training_and_validation_in_one_chart(board: Board) -> None:
    page = board.open("#custom_scalars")
    charts = page.locator("tf-custom-scalar-multi-line-chart-card")
    charts.nth(1).wait_for()
    found = board.ask("data/plugin/custom_scalars/layout")
    [category] = found["category"]
    assert [chart["title"] for chart in category["chart"]] == ["loss", "accuracy"]
    for chart, tags in zip(category["chart"], (["train/loss", "val/loss"], ["val/accuracy"]), strict=True):
        [tag] = chart["multiline"]["tag"]
        lines = board.ask("data/plugin/custom_scalars/scalars", run=TRIALS[0], tag=tag)
        assert sorted(lines["tag_to_events"]) == tags
    assert board.foreign == []


def _colourful(picture: bytes) -> int:
    """Return the number of coloured pixels: the lines of TensorBoard are coloured, its axes are grey."""
    saturations = Image.open(io.BytesIO(picture)).convert("HSV").getchannel("S").tobytes()
    return sum(saturation > 60 for saturation in saturations)


def test_only_runs_are_listed(board: Board) -> None:
    # A folder inside a run (checkpoints, another writer) would be a further line in every legend.
    assert sorted(board.ask("data/runs")) == sorted([RUN, RESUMED, *TRIALS])


@pytest.mark.parametrize("tag", ["train/loss", "train/grad_norm", "val/loss"])
def test_a_resumed_run_has_one_value_per_step_and_the_same_values(board: Board, tag: str) -> None:
    def values(run: str) -> list[list[float]]:
        points = board.ask("data/plugin/scalars/scalars", run=run, tag=tag)
        return [[step, value] for _, step, value in points]

    assert values(RESUMED) == values(RUN)
    steps = [step for step, _ in values(RESUMED)]
    assert steps == sorted(set(steps))


def test_text_shows_the_configuration(board: Board) -> None:
    page = board.open("#text")
    page.get_by_text("_target_: models.vision.ConvNet").first.wait_for()
    assert board.foreign == []


def test_graph_draws_the_network(board: Board) -> None:
    page = board.open(f"#graphs&run={RUN}")
    whole = page.locator('g.node[data-name="TrainingStep"]')
    whole.wait_for(state="attached")
    page.wait_for_timeout(1500)  # the drawing is centred first
    whole.locator("text", has_text="TrainingStep").first.dblclick(force=True)
    page.locator('g.node[data-name="TrainingStep/ConvNet[model]"]').wait_for(state="attached")
    assert board.foreign == []


def test_hparams_show_the_swept_keys_and_the_objective_first(board: Board, root: Path) -> None:
    page = board.open("#hparams")
    grid = page.locator("vaadin-grid")
    for text in (RUN, *TRIALS[:2], f"{RATE:.7f}", f"{_last(root, 'val/loss'):.4f}"):
        grid.get_by_text(text).first.wait_for()
    cells = [text.strip() for text in page.locator("vaadin-grid-cell-content").all_inner_texts()]
    keys = ["vars.note", "model.width", "optimizer.lr"]  # those of the newest sweep first
    start = cells.index(keys[0])
    assert cells[start : start + 5] == [*keys, "val/accuracy", "val/loss"]
    assert board.foreign == []


def test_a_column_of_numbers_and_texts_can_be_sorted(board: Board) -> None:
    """Would be wrong: an error of the server, or one value in two spellings."""
    columns = [{"hparam": "vars.note", "order": "ORDER_ASC"}]
    query = {"colParams": columns, "startIndex": 0, "sliceSize": 100, "allowedStatuses": ["STATUS_SUCCESS"]}
    found = board.post("data/plugin/hparams/session_groups", query)["sessionGroups"]
    notes = [group["hparams"]["vars.note"] for group in found if "vars.note" in group["hparams"]]
    assert notes == sorted([*(str(number) for number in range(3, 14)), "3", "null"])
    [info] = [
        info for info in board.post("data/plugin/hparams/experiment", {})["hparamInfos"] if info["name"] == "vars.note"
    ]
    assert info["domainDiscrete"] == [*(str(number) for number in range(3, 14)), "null"]
