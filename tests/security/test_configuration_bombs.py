"""Configurations that try to exhaust this machine: exit status 2 within seconds, with a message of one paragraph."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher.config import compose, limits
from launcher.errors import LaunchError
from launcher.jobs.prepare import recorded_words
from launcher.runs import RunDirectory, find

GLOBAL = "# @package _global_\n"
SECONDS = 5.0  # CPU time of this process, since other processes may use the machine


def _growing(first: str, item: str, times: int, levels: int) -> str:
    lines = [f"  a{level}: &a{level} [{', '.join([item.format(level - 1)] * times)}]" for level in range(1, levels)]
    return "\n".join(["vars:", f"  a0: &a0 {first}", *lines]) + "\n"


BOMBS: dict[str, str] = {
    "aliases": _growing("[x, x]", "*a{}", 9, 12),
    "an alias inside itself": "vars: {a: &a [*a]}\n",
    "merged aliases": "vars:\n  a0: &a0 {x: 1}\n"
    + "".join(f"  a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 40)),
    "references that double": "vars:\n  a0: xxxxxxxxxx\n"
    + "".join(f"  a{i}: '${{vars.a{i - 1}}}${{vars.a{i - 1}}}'\n" for i in range(1, 60)),
    "references to lists": _growing("[x, x]", "'${{vars.a{}}}'", 8, 20),
    "a loop": "vars: {a: '${vars.b}', b: '${vars.a}'}\n",
    "a loop through a resolver": "vars: {a: '${oc.select:vars.b}', b: '${oc.select:vars.a}'}\n",
    "a long reference": f"vars: {{a: '{'${vars.b}' * 20_000}', b: 1}}\n",
    "nested references": f"vars: {{a: '{'${' * 1000}{'}' * 1000}'}}\n",
    "nested lists": f"vars: {{a: {'[' * 3000}{']' * 3000}}}\n",
    "nested mappings": f"vars: {'{a: ' * 3000}1{'}' * 3000}\n",
    "digits": f"vars: {{a: {'9' * 5000}}}\n",
    "hexadecimal digits": f"vars: {{a: 0x{'f' * 5000}}}\n",
    "many values": f"vars: {{a: [{'1, ' * 60_000}]}}\n",
}


def _refused(action: Callable[[], object]) -> str:
    began = time.process_time()
    with pytest.raises(LaunchError) as caught:
        action()
    assert time.process_time() - began < SECONDS
    assert caught.value.exit_status == 2
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 2000
    return message


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    compose([])


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_of_an_experiment(text: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/evil.yaml").write_text(GLOBAL + text)
    _refused(lambda: compose(["experiment=evil"], tmp_path))


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_of_a_run(text: str, tmp_path: Path) -> None:
    content = {key: value for key, value in compose([]).tree().items() if key != "vars"}
    stored = tmp_path / "config.yaml"
    stored.write_text(OmegaConf.to_yaml(OmegaConf.create(content)) + text)
    _refused(lambda: compose([], stored=stored))


@pytest.mark.parametrize(
    "word",
    [
        f"vars.x={'[' * 3000}{']' * 3000}",
        f"vars.x={'{a:' * 3000}1{'}' * 3000}",
        f"vars.x={'int(' * 3000}1{')' * 3000}",
        f"vars.x={'${' * 3000}",
        f"trainer.epochs={'9' * 5000}",
        f"trainer.epochs=0x{'f' * 5000}",
        f"vars.x=[{'a,' * 100_000}b]",
        f"vars{'.a' * 3000}=1",
        f"vars.x='{'${vars.y}' * 1000}'",
    ],
    ids=lambda word: word[:20],
)
def test_of_a_word(word: str) -> None:
    _refused(lambda: compose([word]))


def test_files_that_include_each_other(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/itself.yaml").write_text(f"{GLOBAL}defaults: [itself]\n")
    (tmp_path / "experiment/many.yaml").write_text(f"{GLOBAL}defaults: [f0@vars.x]\n")
    for level in range(15):
        text = "defaults: [" + ", ".join(f"f{level + 1}@{name}" for name in "abc") + "]\n"
        (tmp_path / f"experiment/f{level}.yaml").write_text(text)
    (tmp_path / "experiment/f15.yaml").write_text("a: 1\n")
    for name in ("itself", "many"):
        _refused(lambda: compose([f"experiment={name}"], tmp_path))  # noqa: B023


def test_of_other_files_of_a_run(tmp_path: Path) -> None:
    """Unreadable parts of overrides.yaml are ignored; the number of the best trial must be a number."""
    run = RunDirectory(tmp_path / "a")
    run.create()
    run.overrides.write_text(f"- {'[' * 100_000}{']' * 100_000}\n")
    assert recorded_words(run) == []
    (run.path / "best.yaml").write_text(f"number: {'9' * 5000}\n")
    _refused(lambda: find(tmp_path, "a/best"))


def test_a_large_configuration_is_accepted(tmp_path: Path) -> None:
    """A thousand labels, a hundred references and twenty levels are allowed."""
    labels = json.dumps([f"label {number}" for number in range(1000)])
    references = "".join(f"  b{number}: '${{vars.labels.{number}}} of ${{vars.one}}'\n" for number in range(100))
    deep = f"{'{a: ' * 20}1{'}' * 20}"
    (tmp_path / "experiment").mkdir()
    text = f"{GLOBAL}vars:\n  one: 1\n  labels: {labels}\n  deep: {deep}\n{references}"
    (tmp_path / "experiment/large.yaml").write_text(text)
    values = compose(["experiment=large"], tmp_path).job.vars
    assert (len(values["labels"]), values["b99"]) == (1000, "label 99 of 1")


def test_the_limits_are_in_the_message() -> None:
    with pytest.raises(LaunchError, match=f"{limits.LONGEST_WORD:,}"):
        limits.check_word("vars.x=" + "a" * 20_000)
