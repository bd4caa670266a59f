"""Values of keys with the type text keep their characters, in words and in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import compose
from launcher.config.literal_text import quote, text_keys


@pytest.mark.parametrize("name", ["83e5123", "1_0", "true", "007", "inf"])
def test_a_word(name: str) -> None:
    job = compose([f"run.name={name}", f"+run.like='{name}'", f"checkpoint.load= {name} "]).job
    assert (job.run.name, job.run.like, job.checkpoint.load) == (name, name, name)


@pytest.mark.parametrize(
    ("word", "value", "expected"),
    [
        ("run.name=1e3", 1e3, "run.name='1e3'"),
        ("run.name=off", "off", "run.name=off"),
        ("run.name=null", None, "run.name=null"),
        ("trainer.epochs=1_0", 10, "trainer.epochs=1_0"),
        ("run.resume=true", True, "run.resume=true"),
    ],
)
def test_quote(word: str, value: object, expected: str) -> None:
    assert quote(word, word.partition("=")[0], value) == expected


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("experiment/a.yaml", "# @package _global_\nrun: {name: 83e5123}\ncheckpoint:\n  load: 1_0\n"),
        ("experiment/a.yaml", "# @package run\nname: 83e5123\n"),
        (
            "config.yaml",
            "defaults: [launch_schema, _self_, model: mlp, data: mnist, optimizer: adamw]\nrun:\n  name: 83e5123\n",
        ),
        ("local/default.yaml", "# @package _global_\nrun: {root: &x 83e5123, name: *x}\ncluster: {name: true}\n"),
    ],
)
def test_a_file(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    job = compose(["experiment=a"] if "experiment/a" in file else [], tmp_path).job
    assert job.run.name == "83e5123"
    assert job.checkpoint.load in (None, "1_0")
    assert job.cluster.name in (None, "true")


def test_a_stored_configuration(tmp_path: Path) -> None:
    composed = compose(["checkpoint.load=1e5", "checkpoint.monitor=true", "cluster.name=08"])
    (tmp_path / "config.yaml").write_text(composed.to_yaml())
    again = compose([], stored=tmp_path / "config.yaml").job
    assert (again.checkpoint.load, again.checkpoint.monitor, again.cluster.name) == ("1e5", "true", "08")


def test_null_interpolations_and_other_types_are_unchanged() -> None:
    job = compose(["+vars.x=7", "checkpoint.load=null", "cluster.name=a${vars.x}", "trainer.epochs=1_0"]).job
    assert (job.checkpoint.load, job.cluster.name, job.trainer.epochs) == (None, "a7", 10)


def test_text_keys() -> None:
    assert {"run.name", "run.root", "checkpoint.load", "cluster.name"} <= text_keys()
    assert not {"run.resume", "trainer.epochs", "cluster.hosts", "model"} & text_keys()
