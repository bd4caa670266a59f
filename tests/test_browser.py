"""TensorBoard in a real browser: `launch board` shows the curves, text, graph and HParams of runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, sync_playwright

LAUNCH = [sys.executable, "-m", "launcher"]
SECONDS = 60_000  # a page on a busy machine, in Playwright's milliseconds
RATE = 0.002
RUN = "digits"
RESUMED = "resumed"  # the same run, killed after step 8 and continued


def _launch(cwd: Path, *words: str) -> None:
    done = subprocess.run([*LAUNCH, *words], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run root with a run of 20 steps, and a copy that lost the steps after 8 and was resumed."""
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
    return root


@dataclass
class Board:
    """Return a TensorBoard server with a browser. `foreign` lists the requests to other machines."""

    url: str
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
        url = next(word for word in server.stderr.readline().split() if word.startswith(f"http://127.0.0.1:{port}/"))
        _wait_for(url, server)
        # Chromium's sandbox needs a user namespace, which root in a container does not have.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=options)
            yield Board(url, browser)
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=240)


def _wait_for(url: str, server: subprocess.Popen[str]) -> None:
    """Wait until TensorBoard responds and has read both runs."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert server.poll() is None, server.stderr.read() if server.stderr else ""
        try:
            with urllib.request.urlopen(f"{url}data/runs", timeout=5) as answer:
                if len(json.load(answer)) >= 2:
                    return
        except OSError:
            pass
        time.sleep(0.3)
    pytest.fail("TensorBoard did not show the runs within 90 s")


def _last(root: Path, tag: str) -> float:
    entries = [json.loads(line) for line in (root / RUN / "metrics.jsonl").read_text().splitlines()]
    return [entry[tag] for entry in entries if tag in entry][-1]


def test_time_series_shows_the_losses_of_training_and_validation(board: Board, root: Path) -> None:
    page = board.open("#timeseries")
    listed = page.locator("runs-data-table")
    listed.get_by_text(RUN, exact=True).wait_for()
    for group in ("train", "val"):
        page.locator("button.group-toolbar", has=page.locator(f'[title="{group}"]')).click()
        card = page.locator("card-view", has=page.locator(f'[title="{group}/loss"]'))
        card.scroll_into_view_if_needed()
        # The table below the chart has one row for each run, with its last value as TensorBoard rounds it.
        value = f"{_last(root, f'{group}/loss'):.4f}".rstrip("0").rstrip(".")
        card.get_by_text(RUN, exact=True).first.wait_for()
        card.get_by_text(value, exact=True).first.wait_for()
        page.wait_for_timeout(1500)  # the line is drawn after the table, on a canvas without an event for its end
        assert _colourful(card.locator(".series-view").screenshot()) > 50, f"no line is drawn for {group}/loss"
    assert board.foreign == []


def _colourful(picture: bytes) -> int:
    """Return the number of coloured pixels: the lines of TensorBoard are coloured, its axes are grey."""
    saturations = Image.open(io.BytesIO(picture)).convert("HSV").getchannel("S").tobytes()
    return sum(saturation > 60 for saturation in saturations)


def test_only_runs_are_listed(board: Board) -> None:
    # A folder inside a run (checkpoints, another writer) would be a further line in every legend.
    assert sorted(board.ask("data/runs")) == [RUN, RESUMED]


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


def test_hparams_show_the_configured_keys(board: Board, root: Path) -> None:
    page = board.open("#hparams")
    page.get_by_text("optimizer.lr").first.wait_for()
    metric = page.locator("paper-checkbox", has_text="val/loss").first
    if metric.get_attribute("aria-checked") != "true":  # TensorBoard selects the first metrics of the alphabet
        metric.click()
    for text in (RUN, f"{RATE:.7f}", f"{_last(root, 'val/loss'):.4f}"):
        page.locator("vaadin-grid").get_by_text(text).first.wait_for()
    assert board.foreign == []
