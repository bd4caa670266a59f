"""The documentation is correct: links have targets, commands parse, keys exist, and examples run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launcher import config
from launcher.cli.filters import take_filter
from launcher.cli.line import parse
from launcher.config import calling_directory, keys, targets
from launcher.engine.checkpoint import load_weights
from launcher.jobs.weights import best_checkpoint
from launcher.runs import RunDirectory
from tests.support.command import LAUNCH, Place

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(ROOT / "docs").glob("*.md"),
]
README, EXTENDING, USAGE = ROOT / "README.md", ROOT / "docs/extending.md", ROOT / "docs/usage.md"
# Keys that the pages show as examples of errors.
WRONG_KEYS = {"trainer.max_epochs"}
# A verb in running text, not a command.
NAMED_ALONE = [["evaluate"], ["predict"], ["export"], ["logs"], ["stop"]]
# Set by choosing an option of their group.
BY_GROUP = {"strategy.name", "cluster.kind"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block."""
    return BLOCK.findall(page.read_text())


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def write_files(page: Path, directory: Path) -> None:
    """Write every block whose first lines name a file (`# conf/model/softmax.yaml`) to that file."""
    for _, text in blocks(page):
        named = [re.fullmatch(r"# ([\w/]+\.(?:py|yaml))", line) for line in text.splitlines()[:2]]
        for match in filter(None, named):
            file = directory / match[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of every `launch` command on a page, in blocks and in the text."""
    candidates = [line for language, text in blocks(page) if language in ("bash", "") for line in text.splitlines()]
    candidates += [line[2:] for language, text in blocks(page) if language == "diff" for line in text.splitlines()]
    candidates += re.findall(r"(?<!`)`(launch [^`]+)`(?!`)", prose(page))
    candidates += re.findall(r"^    (launch [^\n]+)$", prose(page), re.MULTILINE)
    for candidate in candidates:
        for part in re.split(r";\s*(?:do )?", candidate):
            if not part.startswith("launch ") or re.search(r"…|\.\.\.|\bVERB\b|\[VERB", part):
                continue
            words = shlex.split(part.replace("$n", "2"), comments=True)[1:]
            if words not in NAMED_ALONE:
                yield words


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def ids(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_have_targets(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and anchor not in slugs(other)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (README, EXTENDING, page):
        write_files(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(calling_directory, "_calling", [])
    targets.add_calling_directory(tmp_path)
    for words in commands(page):
        line = parse(words)
        sweeps = "multirun" in line.flags
        plain = [word for word in line.words if not (sweeps and is_axis(word))]
        if line.verb == "runs":
            _, plain = take_filter(plain)
        config.compose(plain, line.config_dir)  # raises, and the message names the word


def is_axis(word: str) -> bool:
    """Return whether a word of a sweep has several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word).is_sweep_override()


def test_verbs_are_those_of_the_help() -> None:
    shown = subprocess.run([LAUNCH, "--help"], capture_output=True, text=True, timeout=240, check=True).stdout
    in_help = re.findall(r"^  ([a-z]+) (?:NAME|\[NAME\])? {2,}\S", shown, re.MULTILINE)
    table = USAGE.read_text().partition("## The commands")[2].partition("\n## ")[0]
    in_table = re.findall(r"^\| `([a-z]+)(?: NAME| \[NAME\])?` \|", table, re.MULTILINE)
    assert in_table == [verb for verb in in_help if verb != "launch"]
    assert "train" in in_table


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_keys_exist(page: Path) -> None:
    sections = {*keys.sections(), *keys.OPEN_SECTIONS}
    unknown = []
    for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page)):
        for section, rest in re.findall(r"(?<![\w./-])([a-z]+)\.([a-z_.]+)", text):
            key = f"{section}.{rest}".rstrip(".")
            is_file = re.search(r"\.(py|md|yaml|txt|json)$", key)
            if section in sections and not is_file and key not in WRONG_KEYS and not keys.is_known(key):
                unknown.append(key)
    assert unknown == []


def test_every_key_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES)
    missing = [key for key in keys.leaves() if key not in BY_GROUP and not re.search(rf"\b{re.escape(key)}\b", text)]
    assert missing == []


def test_pictures_are_small_and_refer_to_nothing_outside() -> None:
    for picture in (ROOT / "docs/images").iterdir():
        assert picture.stat().st_size < 300 * 1024, picture.name
        if picture.suffix == ".svg":
            assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?https?:", picture.read_text()), picture.name


@pytest.mark.parametrize("page", [README, USAGE], ids=ids([README, USAGE]))
def test_examples_import_names_that_exist(page: Path) -> None:
    import launcher

    for language, text in blocks(page):
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module == "launcher":
                    assert all(hasattr(launcher, alias.name) for alias in node.names)


# ---- commands and examples -----------------------------------------------------------------------------------------


def run_all(lines: list[list[str]], directory: Path) -> list[dict[str, object]]:
    """Run commands in one process, one after the other, and return the result.json of each run."""
    each = "[cli.run(words) and sys.exit(str(words)) for words in json.load(sys.stdin)]"
    program = f"import json, sys; from launcher import cli; {each}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [Path(line) / "result.json" for line in done.stdout.splitlines() if line.startswith(os.sep)]
    return [json.loads(file.read_text()) for file in made if file.exists()]


def test_the_first_example_runs_unchanged(tmp_path: Path) -> None:
    write_files(EXTENDING, tmp_path)
    sources = [text for language, text in blocks(EXTENDING)[:2] if language in ("python", "yaml")]
    assert len([line for text in sources for line in text.splitlines() if line.strip()]) <= 30
    done = Place(tmp_path, tmp_path / "home").launch(*next(commands(EXTENDING)), seconds=500)
    assert done.status == 0, done.err
    result = json.loads((Path(done.last) / "result.json").read_text())
    assert (result["status"], result["workers"]) == ("completed", 2)
    assert result["metrics"]["val/loss"] < 0.5  # the variance of y is above 1
    assert {"train/absolute_error", "val/absolute_error"} <= result["metrics"].keys()


def test_the_other_examples_run(tmp_path: Path) -> None:
    write_files(EXTENDING, tmp_path)
    _, *rest = commands(EXTENDING)
    # Long enough to execute each part once.
    trained = [[*words, "trainer.epochs=1"] for words in rest if "--config-dir" in words and "cluster=none" in words]
    assert len(trained) >= 12
    (tmp_path / "points.csv").write_text("0,1,2\n0.5,0,-1\n")
    used = [words for words in rest if words[:2] in [["evaluate", "first"], ["predict", "first"], ["export", "first"]]]
    assert len(used) == 4
    results = run_all([*trained, ["plan", "--config-dir", "conf", "experiment=regression"], *used], tmp_path)
    assert [result["status"] for result in results] == ["completed"] * len(trained)
    assert len((tmp_path / "runs/first/evaluations.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "runs/first/export/network.pt2").exists()
    # The fine-tuned classifier.
    both = [load_weights(best_checkpoint(RunDirectory(tmp_path / "runs" / name))) for name in ("digits", "parity")]
    stems = [{name: value for name, value in weights.items() if name.startswith("stem")} for weights in both]
    assert len(stems[0]) == 4
    assert all(torch.equal(value, stems[1][name]) for name, value in stems[0].items())
    assert {"parity.weight", "parity.bias"} <= both[1].keys()


def test_the_mlflow_hook_sends_the_logged_values(tmp_path: Path) -> None:
    """Errors would be values of another step, a repeated metric, or a second record for a resumed run."""
    write_files(EXTENDING, tmp_path)
    (tmp_path / "mlflow.py").write_text(MLFLOW)
    (words,) = [words for words in commands(EXTENDING) if any("tracking.Mlflow" in word for word in words)]
    words += ["cluster=none", "run.name=sent", "trainer.log_every=5"]
    run_all([[*words, "trainer.epochs=1"], [*words, "trainer.epochs=2", "run.resume=true"]], tmp_path)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    logged = [json.loads(line) for line in (tmp_path / "runs/sent/metrics.jsonl").read_text().splitlines()]
    position = ("step", "epoch", "samples", "time")
    assert [call[1:] for call in calls if call[0] == "log_metrics"] == [
        [line["step"], {tag: value for tag, value in line.items() if tag not in position}] for line in logged
    ]
    assert [call[1:] for call in calls if call[0] == "start_run"] == [[None, "sent"], ["run-of-sent", "sent"]]
    assert [call[0] for call in calls].count("end_run") == 2


MLFLOW = """
# A fake of the package, which records its calls.
import json
from types import SimpleNamespace

def note(*call):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")

def set_tracking_uri(uri): note("set_tracking_uri", uri)
def set_experiment(name): note("set_experiment", name)
def log_metrics(values, step): note("log_metrics", step, values)
def end_run(): note("end_run")

def start_run(run_id, run_name):
    note("start_run", run_id, run_name)
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id or f"run-of-{run_name}"))
"""


def test_the_model_of_the_readme_runs(tmp_path: Path) -> None:
    write_files(README, tmp_path)
    (words,) = [words for words in commands(README) if "--config-dir" in words]
    (result,) = run_all([[*words, "cluster=none", "trainer.epochs=1"]], tmp_path)
    metrics = result["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["val/accuracy"] > 0.6
