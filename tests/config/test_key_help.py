"""`launch help KEY` explains every key of the schema, and the page that it names exists."""

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


def test_exactly_the_keys_of_the_schema_have_a_sentence() -> None:
    found = key_help.meanings()
    assert set(leaves()) <= set(found)
    assert all(is_known(key) for key in found)
    for key, sentence in found.items():
        assert sentence.endswith("."), key


def test_each_page_has_the_named_section() -> None:
    for page in (*key_help.PAGES.values(), key_help.SETTINGS):
        path, _, anchor = page.partition("#")
        titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, page


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("trainer.clip_norm", ["trainer.clip_norm: ", key_help.MEANING["trainer.clip_norm"]]),
        ("optimizer.momentum", ["optimizer._target_"]),
        ("checkpoint", ["checkpoint.keep", "checkpoint.load_strict"]),
        ("logs", ["logs NAME", "--no-follow"]),
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


def test_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.epochs"):
        key_help.text("trainer.epoch")
