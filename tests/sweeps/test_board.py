"""TensorBoard's HParams tab in a real browser while a sweep runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from sweep_fixtures import HERE, PROJECT, table

from tests.support.waiting import wait_for

SECONDS = 60_000  # timeout of Playwright in milliseconds, for a busy machine
SWEPT = ["optimizer.lr=0.1,0.2,0.3", "vars.note=1,x", "trainer.clip_norm=1,2", "model.nap=0.02"]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """A sweep of 12 trials, four of which have ended."""
    fixed = ["experiment=line", "cluster=none", f"run.root={tmp_path}", "run.name=s", *SWEPT]
    command = [sys.executable, "-m", "launcher", "-m", "--config-dir", str(PROJECT), *fixed]
    driver = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def has_begun() -> bool:
        assert driver.poll() is None
        return (tmp_path / "s" / "4").exists()

    wait_for(has_begun, 90)
    yield tmp_path
    driver.wait(timeout=240)


@pytest.fixture
def board(running: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "launcher", "board", f"run.root={running}", "--port", port]
    server = subprocess.Popen(command, cwd=running, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = next(word for word in server.stderr.readline().split() if word.startswith("http://")).partition("?")[0]

    def answers() -> bool:
        try:
            urllib.request.urlopen(url, timeout=60).close()
            return True
        except OSError:
            return False

    wait_for(answers, 60)
    yield url
    server.terminate()
    server.wait(timeout=240)


@pytest.mark.slow
def test_the_hparams_tab_shows_every_trial_with_its_values(board: str, running: Path, chromium: str) -> None:
    """Would be wrong: a trial that is missing, a key that was not swept, a value under another key."""
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page(viewport={"width": 1700, "height": 900})
        page.set_default_timeout(SECONDS)

        def cells_now() -> list[str]:
            page.goto(f"{board}#hparams")
            page.reload()
            page.get_by_text("Hyperparameters").first.wait_for()
            page.wait_for_timeout(2000)
            texts = page.locator("vaadin-grid-cell-content").all_inner_texts()
            return [text.strip() for text in texts if text.strip()]

        while_running = cells_now()
        assert "s/000" in while_running
        assert "s/003" in while_running
        wait_for(lambda: [row["state"] for row in table(running / "s")] == ["completed"] * 12, 90)
        page.wait_for_timeout(6000)  # TensorBoard reloads every five seconds
        cells = cells_now()
        picture = os.environ.get("LAUNCH_PICTURES")
        if picture:
            page.screenshot(path=str(Path(picture) / "hparams.png"))
        browser.close()
    for row in table(running / "s"):
        place = cells.index(f"s/{int(row['number']):03}")
        end = next((i for i in range(place + 1, len(cells)) if cells[i].startswith("s/")), len(cells))
        shown = cells[place + 1 : end]
        assert shown[:2] == [f"{float(row['optimizer.lr']):.5f}", row["vars.note"]]
        assert float(shown[2]) == float(row["trainer.clip_norm"])
        assert float(row["objective"]) == pytest.approx(float(shown[3]), rel=1e-3, abs=1e-4)
    assert {"optimizer.lr", "vars.note", "trainer.clip_norm", "val/loss"} <= set(cells)
    assert not {"trainer.epochs", "model.nap", "optimizer.momentum"} & set(cells)
