"""`launch help KEY`: every key of the schema is explained, and the page that is named describes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.config import key_help
from launcher.config.keys import is_known, leaves
from launcher.config.schema import OPEN_SECTIONS
from launcher.errors import ConfigError
from tests.support.command import Place

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_has_one_sentence_and_no_other_has() -> None:
    assert set(leaves()) <= set(key_help.MEANING)
    assert all(is_known(key) for key in key_help.MEANING)
    for key, sentence in key_help.MEANING.items():
        assert sentence.endswith("."), key


def test_each_page_has_the_section_that_is_named() -> None:
    for page in (*key_help.PAGES.values(), key_help.SETTINGS):
        path, _, anchor = page.partition("#")
        titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, page


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("trainer.clip_norm", ["trainer.clip_norm: a number, or null, default null", "Largest global norm"]),
        ("optimizer.momentum", ["an argument of the class that optimizer._target_ names"]),
        ("checkpoint", ["checkpoint.keep", "checkpoint.load_strict"]),
        ("logs", ["launch logs NAME"]),
    ],
)
def test_a_key_a_section_and_a_verb(here: Place, name: str, shown: list[str]) -> None:
    asked = here.here("help", name)
    assert asked.status == 0
    for each in shown:
        assert each in asked.out


def test_all_open_sections_are_explained() -> None:
    for section in OPEN_SECTIONS:
        assert "_target_" in key_help.text(section) or section == "vars"


def test_a_key_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.epochs"):
        key_help.text("trainer.epoch")
