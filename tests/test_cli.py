"""The command line: parsing, help, errors, exit statuses, and the files that are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import line
from launcher.cli.verbs import FLAGS, VERBS, Verb
from launcher.errors import ConfigError
from tests.support.command import LAUNCH, TOY, Place

# ---- parsing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "verb", "name", "overrides", "flags"),
    [
        ([], "train", None, [], {}),
        (["experiment=mnist", "+x.y=1", "~debug"], "train", None, ["experiment=mnist", "+x.y=1", "~debug"], {}),
        (["plan", "--json", "a=1"], "plan", None, ["a=1"], {"json": "yes"}),
        (["evaluate", "a", "b=1"], "evaluate", "a", ["b=1"], {}),
        (["evaluate", "b=1", "sweep/3"], "evaluate", "sweep/3", ["b=1"], {}),
        (["logs", "stop"], "logs", "stop", [], {}),
        (["--config-dir", "runs", "a=1"], "train", None, ["a=1"], {"config_dir": "runs"}),
        (["--config-dir=own", "stop", "a"], "stop", "a", [], {"config_dir": "own"}),
        (["-cd", "own", "a=1", "plan"], "plan", None, ["a=1"], {"config_dir": "own"}),
        (["a=b=c", "x='--json'"], "train", None, ["a=b=c", "x='--json'"], {}),
        (["board", "--port", "7000", "--host=0.0.0.0"], "board", None, [], {"port": "7000", "host": "0.0.0.0"}),
        (["--info", "defaults", "a=1"], "train", None, ["a=1"], {"info": "defaults"}),
        (["--info", "a=1"], "train", None, ["a=1"], {"info": "all"}),
        (["-c", "job", "-p", "trainer"], "train", None, [], {"cfg": "job", "package": "trainer"}),
    ],
)
def test_parse(words: list[str], verb: str, name: str | None, overrides: list[str], flags: dict[str, str]) -> None:
    parsed = line.parse(words)
    assert (parsed.verb, parsed.name, parsed.words, parsed.flags) == (verb, name, overrides, flags)


@pytest.mark.parametrize(
    ("words", "key", "quoted"),
    [
        (["tran"], "tran", r'"tran".*"train"'),
        (["evalute", "a"], "evalute", r'"evalute".*"evaluate"'),
        (["Runs"], "Runs", r'"Runs".*"runs"'),
        (["xyzzy"], "xyzzy", r'"xyzzy".*"\w+"'),
        (["experiment"], "experiment", r'experiment=\w+\..*"\w+"'),
        (["mnist_tiny"], "mnist_tiny", r"experiment=mnist_tiny\?"),
        (["train", "plan"], "plan", r'"plan"'),
        (["--json"], "--json", r"launch plan .*launch runs\b"),
        (["--jsno"], "--jsno", r'"--jsno".*"--json"'),
        (["--port", "1"], "--port", r"launch board\b"),
        (["runs", "--json=yes"], "--json", r"^--json(?!.*launch)"),
        (["--config-dir"], "--config-dir", r"--config-dir DIR"),
        (["--config-dir", "--json"], "--config-dir", r"--config-dir DIR"),
        (["stop"], "", r"launch stop NAME.*launch runs"),
        (["-cn", "other"], "-cn", r"experiment=NAME"),
        (["--config-path=conf"], "--config-path", r"--config-dir DIR"),
        (["--run"], "--run", r"-m"),
        (["--shell-completion", "install=bash"], "--shell-completion", r"--install-completion"),
        (["--config-dir", "a", "--config-dir", "b"], "--config-dir", r" a .* b\."),
        (["logs", "a", "b"], "b", r'"a" and "b"'),
    ],
)
def test_parse_refuses(words: list[str], key: str, quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted) as refused:
        line.parse(words)
    assert refused.value.key == key


# ---- help -----------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_light(tmp_path: Path) -> None:
    """Help needs neither PyTorch nor Ray nor Hydra, because it is the first command that a new user runs."""
    code = "import sys; from launcher import cli; cli.run(['--help']); print(sorted(sys.modules))"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    after = os.times()
    assert not {"'torch'", "'ray'", "'hydra'"} & set(done.stdout.splitlines()[-1].strip("[]").split(", "))
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS), "every verb has a line"
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 1, "of the processor, which other processes use as well"


@pytest.mark.parametrize("words", [["--help"], ["help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_fits_one_screen(here: Place, words: list[str]) -> None:
    shown = here.here(*words)
    lines = shown.out.splitlines()
    assert (shown.status, shown.err) == (0, "")
    assert 2 < len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert not here.runs.exists()


@pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
def test_help_of_a_verb_lists_its_flags(here: Place, verb: Verb) -> None:
    shown = here.here(verb.name, "-h").out
    for flag in FLAGS:
        assert verb.accepts(flag) == bool(re.search(rf"(?<![\w-]){flag.spellings[0]}\b", shown)), flag.name
    assert ("experiment " in shown) == verb.composes


def test_help_lists_the_groups_of_the_user(here: Place) -> None:
    """The user's options are listed, even if the words next to --help are invalid."""
    shown = here.here("train", *TOY, "no.such=1", "--help")
    options = next(line for line in shown.out.splitlines() if line.startswith("  data "))
    assert options.split()[1:4] == ["numbers,", "two,", "asterisk,"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cfg", "job", "-p", "optimizer.lr", "optimizer.lr=0.25"], "0.25\n"),
        (
            ["--cfg", "job", "--resolve", "-p", "vars", "+vars.a=1", "+vars.b=${vars.a}"],
            "# @package vars\na: 1\nb: 1\n",
        ),
        (["train", *TOY, "--cfg", "job", "-p", "model"], "# @package model\n_target_: toy.Line\n"),
        (["--cfg", "hydra"], "hydra:\n"),
        (["-m", "--cfg", "job", "-p", "trainer.seed", "trainer.seed=5,6"], "5\n"),
        (["--info", "defaults-tree"], "experiment: mnist"),
        (["--info", "searchpath", *TOY], "/own"),
        (["--hydra-help"], "== Flags =="),
        (["--version"], "launch-train "),
        (["runs", "--help"], "launch runs [FLAGS]"),
        (["--cfg", "job", "trainer.epochs=7", "trainer.log_every=${trainer.epochs}"], "log_every: ${trainer.epochs}"),
    ],
)
def test_output_of_hydras_flags(here: Place, words: list[str], expected: str) -> None:
    shown = here.here(*words)
    assert (shown.status, shown.err) == (0, "")
    assert expected in shown.out


def test_hydras_flags_do_not_apply_the_hydra_section_of_a_file(here: Place, tmp_path: Path) -> None:
    """Hydra itself configures logging from the files, and the factory of a handler may be any function."""
    (tmp_path / "local").mkdir()
    handlers = "handlers:\n      x:\n        (): os.mkdir\n        path: planted\n"
    (tmp_path / "local/default.yaml").write_text(
        f"# @package _global_\nhydra:\n  hydra_logging:\n    version: 1\n    root:\n      handlers: [x]\n    {handlers}"
    )
    for flag in (["--cfg", "all"], ["--info", "all"], ["--hydra-help"]):
        here.here("train", "--config-dir", str(tmp_path), *flag)
        assert not Path("planted").exists()


# ---- invalid requests: exit 2, one paragraph, nothing written -------------------------------------------------------

WRONG = [
    ("foo=1", r'"foo=1".*"foo"'),
    ("trainer.epoch=1", r'"trainer.epoch".*"trainer.epochs"'),
    ("max_epochs=3", r"trainer.epochs"),
    ("batch_size=3", r"trainer.global_batch_size"),
    ("devices=2", r"scaling.workers"),
    ("accumulate_grad_batches=2", r"trainer.microbatch_size"),
    ("ckpt_path=x", r"run.resume=true"),
    ("trainer.epochs=many", r"trainer.epochs .*'many'"),
    ("trainer.epochs=0", r"trainer.epochs .*\b0\b.*\b1\b"),
    ("trainer.steps=-3", r"trainer.steps .*-3\b.*\b1\b"),
    ("trainer.global_batch_size=0", r"trainer.global_batch_size .*\b0\b.*\b1\b"),
    ("trainer.global_batch_size=41", r"trainer.global_batch_size=41 .*\b40\b"),
    ("trainer.microbatch_size=11", r"trainer.microbatch_size=11 .*\b10\b"),
    ("scaling.workers=0", r"scaling.workers .*\b0\b.*\b1\b"),
    ("scaling.workers=2", r"scaling.workers=2 .*cluster=none.* --nproc-per-node=2"),
    ("scaling.device=cuda", r"scaling.device=cuda.*\bGPU\b"),
    ("checkpoint.monitor=val/acuracy", r"checkpoint.monitor=val/acuracy .*val/loss"),
    ("trainer.log_every=never", r"trainer.log_every .*'never'"),
    ("model=liine", r'"model=liine".*"liine".*"line"'),
    ("model.widht=2", r'model.widht .*toy.Line\b.*"width"'),
    ("optimizer.learning_rate=2", r"optimizer.learning_rate .*\blr\b"),
    ("optimizer.groups=[{match: 'stem.*', lr: 1}]", r"stem"),
    ("model._target_=os.system", r'"os.system".*trust=\[os\]'),
    ("model._target_=torch.nn.Linear", r"training_step|out_features|in_features"),
    ("model._target_=toy.Numbers", r'"toy.Numbers".*torch.nn.Module'),
    (
        "+model.secret_key={_target_: subprocess.Popen, args: [touch, planted]}",
        r'"subprocess.Popen".*trust=\[subprocess\]',
    ),
    ("run.name=a/b", r"run.name .*'a/b'"),
    ("run.name=..", r"run.name .*'\.\.'"),
    ("run.name=.hidden", r"run.name .*'\.hidden'"),
    ("run.name=", r"run.name"),
    ("run.resume=true", r"run.name=NAME"),
    ("run.root=ftp://host/x", r"run.root .*ftp://.*abfss://"),
    ("run.like=missing", r'"missing"'),
    ("checkpoint.load=missing", r"checkpoint.load=missing .*runs\b"),
    ("trainer.epochs=1,2", r'"trainer.epochs=1,2".* -m\b'),
    ("data=idx", r"data.root=\.\.\."),
    ("data.bad=0", r"numbers.csv, row 0: not a number"),
    ("trainer.deterministic=true trainer.precision=bfloat16", r"trainer.precision=float32"),
]


@pytest.mark.parametrize(("words", "quoted"), WRONG, ids=[words for words, _ in WRONG])
def test_an_invalid_request(here: Place, words: str, quoted: str) -> None:
    given = [words] if "{" in words else words.split(" ")
    refused = here.here(*TOY, *given)
    assert refused.status == 2
    assert refused.out == ""
    ours = [line for line in refused.err.splitlines() if line.startswith("launch: ")]
    assert len(ours) == 1, refused.err
    assert re.search(quoted, ours[0]), ours[0]
    assert "Traceback" not in refused.err
    assert here.files() == set()
    assert not os.listdir(here.home)


def test_too_many_workers_for_this_machine(here: Place) -> None:
    """Ray itself would wait for the resources forever."""
    refused = here.here(*TOY, "cluster=local", "scaling.workers=4000")
    assert refused.status == 2
    assert re.search(r"\b4000\b.*scaling\.workers=\d+", refused.err), refused.err
    assert here.files() == set()


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("missing", None, r"nowhere"),
        ("empty", b"", r"train-images"),
        (
            "cut short",
            b"\x00\x00\x08\x03\x00\x00\x00\x05\x00\x00\x00\x1c\x00\x00\x00\x1cxx",
            r"train-images-idx3-ubyte",
        ),
    ],
)
def test_an_error_about_damaged_data_names_the_file(
    here: Place, tmp_path: Path, kind: str, content: bytes | None, message: str
) -> None:
    root = tmp_path / ("nowhere" if content is None else "data")
    if content is not None:
        root.mkdir()
        for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
            (root / name).write_bytes(content)
    refused = here.here("experiment=mnist_tiny", "cluster=none", "data=idx", f"data.root={root}")
    assert refused.status == 2
    assert re.search(message, refused.err), refused.err
    assert refused.err.startswith("launch: ")
    assert len(refused.err.splitlines()) == 1
    assert here.files() == set()


def test_verbose_shows_the_traceback_of_an_error(here: Place) -> None:
    refused = here.here(*TOY, "data.bad=0", "verbose=true")
    assert refused.status == 2
    assert "Traceback (most recent call last)" in refused.err
    assert "row 0: not a number" in refused.err


def test_a_bug_in_launch_is_reported_as_such(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verb, "run", lambda verb, line: 1 // 0)
    failed = here.here("runs")
    assert failed.status == 1
    assert "ZeroDivisionError" in failed.err
    *shown, last = failed.err.splitlines()
    assert any("launcher/cli/command.py" in line for line in shown), "the traceback shows the frames of launch"
    assert "launch" in last


@pytest.mark.parametrize("words", ["runs foo=1", "board trainer.epochs=1", "stop a model=mlp"])
def test_words_without_effect_on_a_verb_are_rejected(here: Place, words: str) -> None:
    refused = here.here(*words.split())
    assert refused.status == 2
    assert f'"{words.split()[-1]}"' in refused.err


# ---- where things are written ---------------------------------------------------------------------------------------


def test_standard_output_contains_only_the_directory(place: Place) -> None:
    """Output of the user's code, its child processes and C++ goes to standard error: scripts read standard output."""
    done = place.launch(*TOY, "run.name=a", "model.speak=true", "data.speak=true", "model.failure=raw", "model.at=3")
    assert (done.status, done.out) == (0, f"{place.runs / 'a'}\n")
    for text in ("a line is built", "row 3 is read", "a child speaks", "raw bytes"):
        assert text in done.err
    assert "Warning" not in done.err
    log = (place.runs / "a/log.txt").read_text()
    assert "[rank 0] row 3 is read" in log
    assert re.search(r"\[rank 0\] \w+ 2/8  \w+ 0\.50", log)
    assert place.files() == {"runs", "runs/a"}, "nothing is written outside the run's directory"
    assert not os.listdir(place.home)


def test_plan_prints_the_plan_and_creates_nothing(here: Place) -> None:
    printed = here.here("plan", *TOY, "--json", "model.speak=true")
    plan = json.loads(printed.out)
    assert printed.status == 0
    assert "a line is built" in printed.err
    assert plan["machines"]["workers"] == 1
    assert plan["batches"]["steps"] == 8
    assert plan["parameters"] == 2
    assert plan["tags"] == ["train/loss", "val/loss"]
    shown = here.here("plan", *TOY)
    assert re.search(r" 10 \w+ = 1 x 10\b", shown.out)
    assert re.search(r" 8 \w+ = 2 \w+ of 4\b", shown.out)
    assert here.files() == set()


def test_the_module_is_the_same_as_the_command(place: Place) -> None:
    words = ("--cfg", "job", "-p", "trainer", *TOY)
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, cwd=place.directory, text=True, check=True
    )
    assert done.stdout == place.launch(*words).out
    assert "global_batch_size: 10" in done.stdout
    assert LAUNCH.exists(), "the package installs a command called launch"
