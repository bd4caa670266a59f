"""Tab completion: the words that are offered, the time that it takes, and the scripts in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import completion
from launcher.errors import ConfigError
from tests.support.command import LAUNCH, Place


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("launch ev", ["evaluate"]),
        ("launch experiment=mn", ["experiment=mnist", "experiment=mnist_tiny"]),
        ("launch -m model=mlp,con", ["model=mlp,convnet"]),
        ("launch callbacks=[e", ["callbacks=[ema"]),
        ("launch train --mu", ["--multirun"]),
        ("launch runs --js", ["--json"]),
        ("launch --cfg j", ["job"]),
        ("launch --install-completion ", ["bash", "fish", "zsh"]),
        ("launch trai", ["train", "trainer."]),
        ("launch trainer.comp", ["trainer.compile=", "trainer.compile_blocks="]),
        ("launch trainer.compile=", ["trainer.compile=false", "trainer.compile=true"]),
        ("launch cluster.hos", ["cluster.hosts="]),
        ("launch optimizer.mom", ["optimizer.momentum="]),
        ("launch +trainer.ep", ["+trainer.epochs="]),
        ("launch help trainer.ep", ["trainer.epochs"]),
        ("launch logs ", ["a", "s", "s/best"]),
        ("launch evaluate s/", ["s/best"]),
        ("launch stop run.root=other ", ["b"]),
        ("launch --config-dir own experiment=to", ["experiment=toy"]),
        ("launch --config-dir o", ["own"]),
    ],
)
def test_completions(line: str, some: list[str], here: Place) -> None:
    for run in ("runs/a", "runs/s", "other/b"):
        (here.directory / run).mkdir(parents=True)
    (here.directory / "runs/s/study.journal").touch()
    try:
        assert set(some) <= set(completion.complete(line))
        assert all(each.startswith(line.split(" ")[-1]) for each in completion.complete(line))
    finally:
        shutil.rmtree(here.directory / "other")


@pytest.mark.parametrize(
    ("line", "others"),
    [
        ("launch runs ", ["experiment=", "trainer."]),
        ("launch runs --", ["--multirun", "--cfg"]),
        ("launch logs a ", ["a"]),
        ("launch plan tr", ["train"]),
    ],
)
def test_words_that_are_not_offered(line: str, others: list[str], here: Place) -> None:
    (here.runs / "a").mkdir(parents=True)
    assert not set(others) & set(completion.complete(line))


def test_it_is_light_and_quick(tmp_path: Path) -> None:
    """At each Tab a process starts, so it must import little; the time is that of the processor."""
    code = (
        "import sys; from launcher.cli import completion; completion.complete('launch trainer.e'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert not {"torch", "ray", "hydra", "omegaconf", "yaml", "rich", "importlib.metadata"} & set(done.stdout.split())
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([LAUNCH, "--complete", "launch experiment=mn"], cwd=tmp_path, check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.15


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_installing_twice_is_the_same_as_once(shell: str, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(variable, raising=False)
    try:
        assert here.here("--install-completion", shell).status == 0
        once = {path: path.read_text() for path in here.home.rglob("*") if path.is_file()}
        assert here.here("--install-completion", shell).status == 0
        assert {path: path.read_text() for path in here.home.rglob("*") if path.is_file()} == once
        assert any("launch --complete" in text for text in once.values())
    finally:
        shutil.rmtree(here.home)
        here.home.mkdir()


def test_an_unknown_shell() -> None:
    with pytest.raises(ConfigError, match="bash, zsh, fish"):
        completion.install("csh")


# Commands that print the completion of a line in a shell.
BASH = """
source "$SCRIPT"
COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}
_launch
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1=; source $SCRIPT; setopt noautolist"
zpty -w z "$1"$'\\t\\C-aprint -r -- RE\"\"SULT '
while zpty -r z line; do print -r -- $line; [[ $line == *RESULT* ]] && break; done
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{LAUNCH.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("launch eval", ["evaluate"]),
        ("launch experiment=mnist_t", ["mnist_tiny"]),
        ("launch trainer.compile_b", ["trainer.compile_blocks="]),
        ("launch --install-completion f", ["fish"]),
    ],
)
def test_bash(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion._SCRIPTS["bash"])
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", line],
        env={**environment(), "SCRIPT": str(tmp_path / "script")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "expected"), [("launch eval", "evaluate"), ("launch experiment=mnist_t", "experiment=mnist_tiny")]
)
def test_fish(line: str, expected: str, tmp_path: Path) -> None:
    folder = tmp_path / "fish/completions"
    folder.mkdir(parents=True)
    (folder / "launch.fish").write_text(completion._SCRIPTS["fish"])
    done = subprocess.run(
        ["fish", "-c", f'source {folder}/launch.fish; complete -C "{line}"'],
        env={**environment(), "XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.split() == [expected], done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("line", "expected"), [("launch eval", "evaluate"), ("launch experiment=mnist_t", "experiment=mnist_tiny")]
)
def test_zsh(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(completion._SCRIPTS["zsh"])
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH, "zsh", line],
        env={**environment(), "SCRIPT": str(tmp_path / "script"), "HOME": str(tmp_path), "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert f"RESULT launch {expected}" in done.stdout
