"""Composition: files and overrides produce the expected job, and errors are reported before anything starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launcher.config import (
    CONF,
    Interval,
    Job,
    compose,
    composition,
    default_run_name,
    masking,
    own_hydra,
    parse_interval,
    sources,
)
from launcher.config.settings import Settings
from launcher.engine.strategies.kinds import base  # noqa: F401 (registers the checks of strategies, as jobs do)
from launcher.errors import ConfigError, LaunchError, TrustError


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GLOBAL = "# @package _global_\n"
A = "experiment/a.yaml"


def experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


# --- composed jobs ----------------------------------------------------------------------------------------------------


def test_the_default_job_is_mnist() -> None:
    job = compose([]).job
    assert isinstance(job, Job)
    assert job.data["_target_"] == "models.vision_data.Mnist"
    assert job.optimizer["_target_"] == "torch.optim.AdamW"
    assert job.optimizer["lr"] == 5e-3
    assert job.scheduler["_target_"] == "launcher.engine.optim.WarmupCosine"
    assert job.trust == []
    assert job.run.name is None
    assert job.cluster.kind == "local"


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_composes_and_opens_with_its_command(name: str) -> None:
    composed = compose([f"experiment={name}"])
    assert composed.choices["experiment"] == name
    assert f"# launch experiment={name}" in (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[:2]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "debug").glob("*.yaml")))
def test_every_debug_overlay_composes_over_every_experiment(name: str) -> None:
    for experiment in experiments():
        compose([f"experiment={experiment}", f"debug={name}"])


@pytest.mark.parametrize("group", ["trainer", "scaling", "checkpoint", "logging"])
def test_the_files_that_show_the_keys_agree_with_the_schema(group: str) -> None:
    shown = OmegaConf.to_container(OmegaConf.load(CONF / group / "default.yaml"))
    assert shown == OmegaConf.to_container(OmegaConf.structured(Job)[group])


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["trainer.epochs=3"], "trainer.epochs", 3),
        (["+trainer.epochs=3"], "trainer.epochs", 3),
        (["++trainer.epochs=3"], "trainer.epochs", 3),
        (["trainer.epochs=1", "trainer.epochs=2"], "trainer.epochs", 2),
        (["trainer={epochs: 4, steps: 5}"], "trainer.steps", 5),
        (["trainer.steps=null"], "trainer.steps", None),
        (["trainer.clip_norm=1"], "trainer.clip_norm", 1.0),
        (["optimizer=sgd"], "optimizer.momentum", 0.9),
        (["optimizer=sgd", "optimizer.lr=0.5"], "optimizer.lr", 0.5),
        (["optimizer.foreach=true"], "optimizer.foreach", True),
        (["+optimizer.foreach=true"], "optimizer.foreach", True),
        (["~optimizer.eps"], "optimizer", {"betas": [0.9, 0.999], "weight_decay": 0.05, "lr": 5e-3, "groups": []}),
        (
            ["optimizer.groups=[{match: 'features.*', lr: 1e-5}]"],
            "optimizer.groups",
            [{"match": "features.*", "lr": 1e-5}],
        ),
        (["scheduler=cosine"], "scheduler.min_ratio", 0.0),
        (["vars.where=/data", "data.root=${vars.where}/x"], "data.root", "/data/x"),
        (["data.root='a b, c=d'"], "data.root", "a b, c=d"),
        (["data.root=${hydra:runtime.cwd}/x"], "data.root", str(Path.cwd() / "x")),
        (["cluster=none"], "cluster.kind", "none"),
        (["+experiment=mnist_tiny"], "trainer.log_every", 1),
        (["debug=overfit"], "trainer.overfit_batches", 1),
        (["debug=null"], "trainer.overfit_batches", 0),
        (["run.name=5"], "run.name", "5"),
        (["run.name=a", "run.resume=auto"], "run.resume", "auto"),
        (["scaling.workers=3"], "scaling.workers", 3),
        (["trust=[mypackage,other.part]"], "trust", ["mypackage", "other.part"]),
        (["+trust=mypackage"], "trust", ["mypackage"]),
    ],
)
def test_overrides(words: list[str], key: str, value: Any) -> None:
    found: Any = compose(words).job
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    if key == "optimizer":
        found.pop("_target_")
    assert found == value


def test_an_override_takes_precedence_over_an_overlay() -> None:
    assert compose(["debug=pdb"]).job.data["_if_taken_"] == {"num_workers": 0}
    commanded = compose(["debug=pdb", "data.num_workers=2"])
    assert commanded.job.data["num_workers"] == 2
    assert commanded.job.data["_if_taken_"] == {}
    assert "_if_taken_: {}" in commanded.to_yaml()


def test_choices_and_given() -> None:
    composed = compose(["experiment=mnist_tiny", "+trainer.epochs=2", "~optimizer.eps", "model=resnet18"])
    assert composed.choices["experiment"] == "mnist_tiny"
    assert composed.choices["model"] == "resnet18"
    assert not any(name.startswith("hydra") for name in composed.choices)
    assert composed.given == {"experiment", "trainer.epochs", "optimizer.eps", "model"}


# --- errors ----------------------------------------------------------------------------------------------------------

# The word, and what its error quotes. The key of the error is that of the word, or the third item.
WRONG: list[tuple[str, ...]] = [
    # unknown keys: the nearest key, and the names of other tools
    ("trainer.epoch=1", r'"trainer.epoch".*"trainer.epochs"'),
    ("epochs=1", r'"trainer.epochs"'),
    ("+trainer.epoch=1", r'"trainer.epochs"'),
    ("++scaling.wrokers=1", r'"scaling.workers"'),
    ("trainer={epoch: 1}", r'"trainer.epoch".*"trainer.epochs"', "trainer.epoch"),
    ("experment=mnist", r'"experiment"'),
    ("anything=1", r'"anything"'),
    ("max_epochs=3", r"trainer.epochs"),
    ("trainer.max_epochs=3", r"trainer.epochs"),
    ("+trainer.max_epochs=3", r"trainer.epochs"),
    ("batch_size=3", r"trainer.global_batch_size"),
    ("trainer.batch_size=3", r"trainer.global_batch_size"),
    ("accumulate_grad_batches=2", r"trainer.microbatch_size"),
    ("trainer.gradient_accumulation_steps=2", r"trainer.microbatch_size"),
    ("devices=2", r"scaling.workers"),
    ("trainer.gpus=2", r"scaling.workers"),
    ("num_workers=2", r"scaling.workers"),
    ("nproc_per_node=2", r"scaling.workers"),
    ("ckpt_path=x", r"run.resume.*checkpoint.load"),
    ("trainer.resume_from_checkpoint=x", r"run.resume"),
    ("learning_rate=1", r"optimizer.lr"),
    ("lr=1", r"optimizer.lr"),
    ("bf16=true", r"trainer.precision"),
    ("max_steps=4", r"trainer.steps"),
    ("gradient_clip_val=1", r"trainer.clip_norm"),
    ("seed=1", r"trainer.seed"),
    # groups
    ("model=resnt18", r'"resnet18".*: captioner, convnet'),
    ("experiment=[mnist,nope]", r'"nope".*mnist'),
    ("optimizer=3", r'"3".*adamw'),
    ("modle=convnet", r'"model"'),
    ("model/nope=convnet", r'"model/nope"'),
    # not an override
    ("trainer.epochs", r"trainer.epochs=VALUE"),
    ("--epochs=3", r"'--epochs=\"VALUE\"'"),
    ("mnist", r"data=mnist or experiment=mnist"),
    ("data.root=a b:c,{", r"'data.root=\"VALUE\"'"),
    ("=3", r'"=3".*""'),
    # Hydra's own
    ("hydra.run.dir=x", r"run.root"),
    ("hydra.verbose=true", r"verbose=true"),
    ("hydra/launcher=basic", r"cluster=NAME"),
    ("+hydra.searchpath=[pkg://os]", r"config-dir"),
    # sweeps without -m
    ("trainer.epochs=1,2", r"-m\b.*trainer.epochs=\[...\]"),
    ("optimizer.lr=interval(0,1)", r"-m\b.*optimizer.lr=\[...\]"),
    ("model=glob(*)", r"-m\b.*model=\[...\]"),
    # deletions
    ("~trainer.epochs", r'"~trainer.epochs"'),
    ("~model", r"model=NAME.*`_target_`"),
    ("~optimizer.nope", r"'optimizer.nope'", ""),
    # types
    ("trainer.epochs=many", r"'many'"),
    ("trainer.epochs=1.5", r"'1.5'"),
    ("trainer.compile=perhaps", r"'perhaps'"),
    ("trainer=3", r'"3".*default'),
    ("logging.hparams=lr", r"logging.hparams"),
    ("logging.profile=[15,10]", r"\[15, 10\].*\[10,15\]"),
    ("logging.profile=[0,3]", r"\[0, 3\].* 1\b"),
    ("logging.profile=[1,101]", r"\[1, 101\].*\b100\b"),
    ("logging.profile=[3]", r"\[3\].*\[10,15\]"),
    ("optimizer.lr=fast", r"'fast'.* 0\b"),
    ("optimizer.lr=-1", r"-1\b.* 0\b"),
    # values
    ("trainer.global_batch_size=0", r" 0\b.* 1\b"),
    ("trainer.global_batch_size=-4", r" -4\b.* 1\b"),
    ("trainer.microbatch_size=0", r" 0\b.* 1\b"),
    ("trainer.epochs=0", r" 0\b.* 1\b"),
    ("trainer.steps=-1", r" -1\b.* 1\b"),
    ("trainer.clip_norm=0", r" 0\b"),
    ("trainer.clip_norm=nan", r" nan\b"),
    ("trainer.seed=-1", r" -1\b.* 0\b"),
    ("trainer.overfit_batches=-1", r" -1\b.* 0\b"),
    ("scaling.workers=0", r" 0\b.* 1\b"),
    ("scaling.workers=two", r"'two'.* 1\b"),
    ("scaling.workers=true", r" True\b.* 1\b"),
    ("scaling.workers=1.5", r" 1\.5\b.* 1\b"),
    ("scaling.cpus_per_worker=0", r" 0\b"),
    ("scaling.gpus_per_worker=-1", r" -1\b.* 0\b"),
    ("scaling.device=gpu", r"auto, cpu, cuda"),
    ("trainer.precision=bf16", r"float32, bfloat16, float16.*\"bfloat16\""),
    ("checkpoint.mode=mn", r"min, max.*\"min\""),
    ("checkpoint.keep=0", r" 0\b.* 1\b"),
    ("cluster.kind=azur", r"local, none"),
    ("strategy.name=dpp", r"\"ddp\""),
    ("strategy=dilco", r"diloco"),
    ("strategy.compression=fp8", r"none, bf16, fp16, powersgd"),
    ("strategy.compression=bfloat16", r"\"bf16\""),
    ("strategy.inner_steps=5", r"strategy=local_sgd and diloco.*\bddp\b"),
    ("strategy.powersgd_rank=2", r"strategy.compression=powersgd"),
    ("trainer.log_every=0", r" 0\b.*1ep\b"),
    ("trainer.evaluate_every=often", r"'often'"),
    ("checkpoint.every=-1", r" -1\b"),
    ("run.name=a/b", r"'a/b'"),
    ("run.name=..", r"'\.\.'"),
    ("run.name=a..b", r"'a\.\.b'"),
    ("run.name=.hidden", r"'\.hidden'"),
    ("run.name=''", r"''"),
    ("run.name=' '", r"' '"),
    ("run.name='a\tb'", r"'a\\tb'"),
    ("run.name='a\x1b[31m'", r"'a\\x1b\[31m'"),
    ("run.root=''", r"run.root"),
    ("run.resume=true", r"run.name=NAME"),
    ("run.resume=auto", r"run.name=NAME"),
    ("run.resume=1", r" 1\b"),
    ("run.resume=maybe", r"'maybe'"),
    ("trust=3", r"trust=\[mypackage\]"),
    ("trust=[${vars.x}]", r"trust=\[mypackage\]"),
    ("trust=[a b]", r"trust=\[mypackage\]"),
    ("~trust", r"trust=\[mypackage\]"),
    ("+trust.0=os", r"trust=\[PACKAGE\]"),
    # interpolation
    ("data.root=${oc.env:SURELY_UNSET}", r"\bSURELY_UNSET\b"),
    ("data.root=${nowhere.at_all}", r"'nowhere.at_all'"),
    ("trainer.epochs=${vars.n}", r"'vars.n'"),
    ("data.root=???", r"data.root=\.\.\."),
    ("data=idx", r"data.root=\.\.\.", "data.root"),
]


@pytest.mark.parametrize("row", WRONG, ids=[row[0] for row in WRONG])
def test_an_invalid_word_is_reported(row: tuple[str, ...]) -> None:
    word, quoted, *key = row
    with pytest.raises(ConfigError, match=quoted) as caught:
        compose([word])
    assert caught.value.key == (key or [word.lstrip("+~").partition("=")[0]])[0]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("words", "key", "quoted"),
    [
        (["trainer.deterministic=true", "trainer.precision=float16"], "trainer.deterministic", "precision=float32"),
        (["run.name=a", "run.like=b", "run.resume=true"], "run.resume", r"run\.like"),
        (["vars.n=x", "trainer.epochs=${vars.n}"], "trainer.epochs", "'x'"),
        (["strategy=local_sgd", "strategy.outer_lr=0.5"], "strategy.outer_lr", "strategy=diloco.*local_sgd"),
        (["strategy=diloco", "strategy.overlap_steps=20"], "strategy.overlap_steps", "20.*strategy.inner_steps=20"),
        (["strategy=diloco", "strategy.outer_momentum=1"], "strategy.outer_momentum", r" 1\.?0?\b.* 1\b"),
        (["strategy=diloco", "strategy.inner_steps=0"], "strategy.inner_steps", r" 0\b.* 1\b"),
        (["strategy=fsdp", "strategy.compression=powersgd"], "strategy.compression", "compression=bf16.*strategy=ddp"),
        (["strategy=fsdp", "trainer.deterministic=true"], "trainer.deterministic", "strategy=ddp.*compression=none"),
        (
            ["strategy.compression=bf16", "trainer.deterministic=true"],
            "trainer.deterministic",
            "strategy=ddp.*compression=none",
        ),
    ],
)
def test_contradicting_words_are_reported(words: list[str], key: str, quoted: str) -> None:
    with pytest.raises(ConfigError, match=quoted) as caught:
        compose(words)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("value", "interval"),
    [
        (50, Interval(steps=50)),
        ("50", Interval(steps=50)),
        ("1ep", Interval(epochs=1)),
        ("2 ep", Interval(epochs=2)),
        ("30s", Interval(seconds=30)),
        ("10min", Interval(seconds=600)),
        ("1.5h", Interval(seconds=5400)),
    ],
)
def test_intervals(value: Any, interval: Interval) -> None:
    assert parse_interval(value, "key") == interval


@pytest.mark.parametrize(
    "value", [0, -1, "0", "0ep", "1.5ep", "1.5", 1.5, True, None, "", "10 parsecs", "ep", "1e3", []]
)
def test_invalid_intervals(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.log_every"):
        parse_interval(value, "trainer.log_every")


def test_default_run_name() -> None:
    now = datetime(2026, 3, 4, 5, 6, 7)
    assert default_run_name({"experiment": "mnist"}, now) == "mnist-20260304-050607"
    assert default_run_name({}, now) == "run-20260304-050607"
    assert default_run_name({"experiment": ["mnist", "own/thing"]}, now) == "mnist-own-thing-20260304-050607"


# --- a user's own directory ------------------------------------------------------------------------------------------


def test_own_files_take_precedence_and_ours_remain(tmp_path: Path) -> None:
    own = write(
        tmp_path,
        {
            "model/mine.yaml": "_target_: mymodule.Net\nwidth: 7\n",
            "optimizer/adamw.yaml": "_target_: torch.optim.AdamW\nlr: 7\n",
            "experiment/mine.yaml": f"{GLOBAL}defaults:\n  - override /model: mine\ntrainer:\n  epochs: 7\n",
            "local/default.yaml": "# @package _global_\nrun:\n  root: /elsewhere\n",
        },
    )
    with pytest.raises(TrustError, match=r"mymodule\.Net"):
        compose(["experiment=mine"], own)
    job = compose(["experiment=mine", "trust=[mymodule]"], own).job
    assert (job.model, job.optimizer["lr"], job.trainer.epochs) == ({"_target_": "mymodule.Net", "width": 7}, 7, 7)
    assert job.run.root == "/elsewhere"
    assert compose(["experiment=mnist", "model=resnet18"], own).job.model["_target_"] == "models.vision.ResNet18"


def test_an_own_primary_configuration_takes_precedence_and_is_typed(tmp_path: Path) -> None:
    text = "defaults:\n  - model: convnet\n  - data: mnist\n  - optimizer: adamw\n  - _self_\ntrainer:\n  epochs: 9\n"
    own = write(tmp_path, {"config.yaml": text})
    job = compose([], own).job
    assert job.trainer.epochs == 9
    assert job.checkpoint.monitor == "val/loss"
    assert compose(["experiment=mnist_tiny"], own).job.trainer.log_every == 1  # although its defaults do not list it
    with pytest.raises(ConfigError, match=r"trainer\.epochs"):
        compose(["trainer.epochs=x"], own)
    write(tmp_path, {"config.yaml": text + "  epoch: 3\n"})
    with pytest.raises(ConfigError, match=r'"trainer\.epochs"'):
        compose([], own)


@pytest.mark.parametrize(
    ("files", "words", "key", "quoted"),
    [
        ({A: f"{GLOBAL}trainer:\n  epoch: 1\n"}, ["experiment=a"], "trainer.epoch", r'/a.yaml.*"trainer.epochs"'),
        ({A: f"{GLOBAL}trainer:\n  max_epochs: 1\n"}, ["experiment=a"], "trainer.max_epochs", r"trainer.epochs\b"),
        ({A: f"{GLOBAL}trainer:\n  epochs: x\n"}, ["experiment=a"], "trainer.epochs", r"'x'"),
        ({A: "trainer:\n  epochs: 1\n"}, ["experiment=a"], "experiment", r"_global_"),
        ({A: f"{GLOBAL}defaults:\n  - override /model: nope\n"}, ["experiment=a"], "model", r"model/nope.*convnet"),
        ({"local/default.yaml": "run:\n  root: x\n"}, [], "local", r"_global_"),
        ({"model/a.yaml": "a: [1\n"}, ["model=a"], "", r"model/a.yaml.* YAML.*line 2"),
        ({"model/a.yaml": "a: b: c\n"}, ["model=a"], "", r"model/a.yaml.* YAML.*line 1"),
        ({"config.yaml": "- 1\n"}, [], "", r"config.yaml"),
        ({"config.yaml": "a: [\n"}, [], "", r"config.yaml.* YAML.*line 2"),
        ({"config.yaml": "hydra:\n  searchpath: [pkg://antigravity]\n"}, [], "hydra.searchpath", r"searchpath"),
        ({"model/a.yaml": "scheduler: null\nwidth: 3\n"}, ["model=a"], "model", r"model=NAME.*_target_"),
        ({A: f"{GLOBAL}scheduler: null\n"}, ["experiment=a"], "scheduler", r"experiment/a.yaml|scheduler"),
    ],
)  # fmt: skip
def test_errors_in_own_files_are_reported(
    files: dict[str, str], words: list[str], key: str, quoted: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=quoted) as caught:
        compose(words, write(tmp_path, files))
    assert caught.value.key == key


@pytest.mark.parametrize("name", ["it's here", "a,b", "ä ö", "a[1]{2}", "x=y"])
def test_directories_with_odd_names(name: str, tmp_path: Path) -> None:
    own = write(tmp_path / name, {"model/mine.yaml": "_target_: models.vision.MLP\n"})
    assert compose(["model=mine"], own).job.model == {"_target_": "models.vision.MLP"}


def test_a_missing_directory() -> None:
    with pytest.raises(ConfigError, match="/does/not/exist"):
        compose([], Path("/does/not/exist"))


def test_groups_include_those_of_the_user(tmp_path: Path) -> None:
    own = write(tmp_path, {"model/mine.yaml": "", "paths/here.yaml": ""})
    groups = sources(own).groups()
    assert {"convnet", "mine"} <= set(groups["model"])
    assert groups["paths"] == ["here"]


# --- an untrusted configuration ---------------------------------------------------------------------------------------

# Places for code. Each would create the file `pwned` if it were called.
PLANTED: list[tuple[str, str]] = [
    ("model", "_target_: os.system\ncommand: touch pwned\n"),
    ("model", "_target_: models.vision.ConvNet\nwidth:\n  _target_: os.system\n  command: touch pwned\n"),
    ("model", "_target_: models.vision.ConvNet\nwidth:\n  - a: [{_target_: builtins.eval}]\n"),
    ("data", "_target_: subprocess.Popen\nargs: touch pwned\n"),
    ("data", "_target_: [os.system]\n"),
    ("data", "_target_: {a: os.system}\n"),
    ("scheduler", "_target_: torch.utils.collect_env.run\ncommand: touch pwned\n"),
    ("optimizer", "_target_: antigravity.geohash\n"),
    ("optimizer", "_target_: ${vars.name}\n"),
    ("optimizer", '_target_: ${oc.decode:"os.system"}\n'),
    ("optimizer", "_target_: ${vars.deep}\nlr: 1\n"),
    ("data", "_target_: models.vision_data.Mnist\nlimit: '${oc.create:\"{_target_: os.system}\"}'\n"),
    ("vars", "x:\n  _target_: os.system\n"),
]
VARS = "\nvars:\n  name: os.system\n  deep: ${vars.name}\n"


@pytest.mark.parametrize(("section", "text"), PLANTED)
def test_planted_targets(
    section: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    indented = "".join(f"  {line}\n" for line in text.splitlines())
    other = VARS if section != "vars" else ""
    own = write(tmp_path / "own", {"experiment/evil.yaml": f"# @package _global_\n{section}:\n{indented}{other}"})
    stored = tmp_path / "config.yaml"
    stored.write_text(compose([]).to_yaml())
    content = OmegaConf.load(stored)
    content.merge_with(OmegaConf.create(f"{section}:\n{indented}{other}"))
    OmegaConf.save(content, stored)
    for action in (lambda: compose(["experiment=evil"], own), lambda: compose([], stored=stored)):
        with pytest.raises(TrustError, match=rf"{section}.*_target_"):
            action()
    assert not (tmp_path / "pwned").exists()
    assert not {"antigravity", "torch.utils.collect_env", "models", "models.vision"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "text",
    [
        "hydra:\n  callbacks:\n    x:\n      _target_: os.system\n      command: touch pwned\n",
        "hydra:\n  launcher:\n    _target_: os.system\n",
        "hydra:\n  job_logging:\n    handlers:\n      x:\n        _target_: os.system\n",
        "hydra:\n  sweeper:\n    _target_: ${vars.name}\n",
        "hydra:\n  sweeper:\n    params:\n      x: [{_target_: models.vision.ConvNet}]\n",
    ],
)
def test_planted_hydra_sections(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overlay = write(tmp_path / "a", {"experiment/evil.yaml": f"# @package _global_\n{text}"})
    with pytest.raises(TrustError, match=r"hydra.*_target_"):
        compose(["experiment=evil"], overlay)
    primary = write(tmp_path / "b", {"config.yaml": (CONF / "config.yaml").read_text() + text})
    with pytest.raises(TrustError, match=r"hydra.*_target_"):
        compose([], primary)
    stored = write(tmp_path, {"config.yaml": compose([]).to_yaml() + text}) / "config.yaml"
    with pytest.raises(ConfigError, match="hydra"):
        compose([], stored=stored)
    assert not (tmp_path / "pwned").exists()


def test_logging_configuration_is_never_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handler = "hydra:\n  job_logging:\n    handlers:\n      x:\n        (): os.system\n        command: touch pwned\n"
    with pytest.raises(ConfigError, match=r"hydra\.job_logging"):
        compose(["experiment=evil"], write(tmp_path, {"experiment/evil.yaml": f"# @package _global_\n{handler}"}))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("word", ["+hydra.callbacks.x._target_=os.system", "model._target_=os.system"])
def test_planted_words(word: str) -> None:
    with pytest.raises(LaunchError) as caught:
        compose([word])
    assert caught.value.exit_status == 2


def test_hydras_own_targets_are_exactly_the_allowed_ones() -> None:
    from launcher.config.targets import find_targets

    where = sources()
    with own_hydra.own_hydra():
        composed = own_hydra.compose_with_hydra([], where, own_hydra.primary_node(where, Settings()), Settings())
        assert {target for _, target in find_targets(composition._hydra_node(composed))} == composition._HYDRA_TARGETS


@pytest.mark.parametrize(
    "files",
    [
        {"experiment/evil.yaml": "# @package _global_\ntrust: [os]\n"},
        {"experiment/evil.yaml": "# @package trust\n- os\n"},
        {"experiment/evil.yaml": "# @package _global_\ntrust: ['${vars.x}']\nvars: {x: os}\n"},
    ],
)
def test_a_file_cannot_set_trust(files: dict[str, str], tmp_path: Path) -> None:
    own = write(tmp_path / "own", files)
    with pytest.raises(LaunchError, match=r"trust|mapping|list") as caught:
        compose(["experiment=evil"], own)
    assert caught.value.exit_status == 2
    with pytest.raises(LaunchError):  # not even together with a word
        compose(["experiment=evil", "trust=[mine]"], own)


def test_a_stored_configuration_cannot_set_trust(tmp_path: Path) -> None:
    trusting = compose(["trust=[mine]", "model._target_=mine.Net"])
    assert "trust" not in OmegaConf.create(trusting.to_yaml())
    stored = write(tmp_path, {"config.yaml": trusting.to_yaml()}) / "config.yaml"
    with pytest.raises(TrustError, match=r"mine\.Net"):
        compose([], stored=stored)
    assert compose(["trust=[mine]"], stored=stored).job.trust == ["mine"]
    write(tmp_path, {"config.yaml": trusting.to_yaml() + "trust: [mine]\n"})
    with pytest.raises(TrustError, match=r"mine\.Net"):  # it is dropped
        compose([], stored=stored)


# --- the stored configuration -----------------------------------------------------------------------------------------


def test_a_stored_configuration_is_read_again(tmp_path: Path) -> None:
    first = compose(["experiment=resnet", "trainer.epochs=3", "optimizer.lr=1e-5", "run.name=a", "run.resume=auto"])
    stored = write(tmp_path, {"config.yaml": first.to_yaml(run_name="b")}) / "config.yaml"
    assert OmegaConf.load(stored).run.name == "b"
    again = compose([], stored=stored).job
    assert (again.run.name, again.run.resume) == (None, False)  # these belong to the command
    again.run = first.job.run
    assert again == first.job


def test_words_apply_over_a_stored_configuration(tmp_path: Path) -> None:
    own = write(tmp_path / "own", {"data/mine.yaml": "_target_: models.vision_data.Idx\nroot: /x\n"})
    first = compose(["experiment=mnist_tiny", "data.split_seed=3", "optimizer.foreach=true"])
    stored = write(tmp_path, {"config.yaml": first.to_yaml()}) / "config.yaml"
    job = compose(["data=mine", "trainer.epochs=8", "+model.width=5", "scheduler=cosine"], own, stored).job
    assert job.data == {"_target_": "models.vision_data.Idx", "root": "/x"}  # the stored section is replaced
    assert job.optimizer == first.job.optimizer
    assert (job.trainer.epochs, job.trainer.log_every, job.model["width"]) == (8, 1, 5)
    assert job.scheduler["warmup_steps"] is None
    assert compose(["debug=fast"], stored=stored).job.trainer.steps == 5


@pytest.mark.parametrize("value", [False, True, "x"])
def test_a_removed_key_is_ignored_in_a_stored_configuration(value: Any, tmp_path: Path) -> None:
    """Otherwise runs of earlier versions could not be resumed, evaluated or listed."""
    content = OmegaConf.create(compose(["scaling.workers=3"]).to_yaml())
    content.scaling.heal = value
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(content))
    again = compose([], stored=tmp_path / "config.yaml")
    assert again.job.scaling.workers == 3
    assert "heal" not in again.to_yaml()
    with pytest.raises(ConfigError, match=r"scaling\.heal"):
        compose(["scaling.heal=false"], stored=tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "words", "key", "quoted"),
    [
        ("", ["experiment=mnist"], "experiment", '"experiment=mnist"'),
        ("", ["model=nope"], "model", "convnet"),
        ("", ["trainer.epoch=1"], "trainer.epoch", "trainer.epochs"),
        ("", ["+paths=x"], "paths", "paths"),
        ("defaults: [{model: convnet}]\n", [], "defaults", "defaults"),
        ("hydra: {searchpath: ['pkg://antigravity']}\n", [], "hydra", "hydra"),
        ("surprise: 1\n", [], "surprise", "surprise"),
        ("trainer: {epochs: x}\n", [], "trainer.epochs", "'x'"),
        ("trainer: {epoch: 2}\n", [], "trainer.epoch", "trainer.epochs"),
        ("trainer: 3\n", [], "trainer", " 3"),
        ("model: [1]\n", [], "model", r"\[1\]"),
    ],
)
def test_errors_over_a_stored_configuration(text: str, words: list[str], key: str, quoted: str, tmp_path: Path) -> None:
    content = OmegaConf.to_container(OmegaConf.create(compose([]).to_yaml()))
    assert isinstance(content, dict)
    content.update(OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=quoted) as caught:
        compose(words, stored=tmp_path / "config.yaml")
    assert caught.value.key == key
    assert "antigravity" not in set(sys.modules) - before


@pytest.mark.parametrize(
    "content", [None, b"a: [", b"- 1\n", b"\xff\xfe\x00", b"!!python/object/apply:os.system [touch pwned]"]
)
def test_a_stored_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        compose([], stored=tmp_path / "config.yaml")


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_the_environment_stays_unresolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "hunter2")
    words = ["vars.password=${oc.env:HIDDEN}", "data.root=x/${oc.env:HIDDEN}", "vars.header='Bearer ${oc.env:HIDDEN}'"]
    composed = compose(words)
    assert composed.job.data["root"] == "x/hunter2"
    text = composed.to_yaml()
    assert "hunter2" not in text
    assert text.count("${oc.env:HIDDEN}") == 3


def test_literal_secrets_are_masked_and_requested_again(tmp_path: Path) -> None:
    words = ["vars.hf_token=hunter2", "data.account_key=hunter2", "data.root='abfss://a?sv=1&sig=hunter2'"]
    composed = compose(words)
    assert "hunter2" not in composed.to_yaml()
    assert "hunter2" not in " ".join(composed.masked_words())
    stored = write(tmp_path, {"config.yaml": composed.to_yaml()}) / "config.yaml"
    with pytest.raises(ConfigError, match=r"data\.account_key"):
        compose([], stored=stored)
    job = compose(["data.account_key=again", "data.root=/x"], stored=stored).job
    assert job.data["account_key"] == "again"  # vars.hf_token is still masked, but is not used
    with pytest.raises(ConfigError, match=r"vars\.hf_token"):
        compose(["data.account_key=again", "data.root=${vars.hf_token}"], stored=stored)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("token", True),
        ("hf_token", True),
        ("hfToken", True),
        ("api-key", True),
        ("account_key", True),
        ("password", True),
        ("db_password", True),
        ("client_secret", True),
        ("sas", True),
        ("sas_url", True),
        ("credentials", True),
        ("connection_string", True),
        ("tokenizer", False),
        ("max_tokens", False),
        ("eos_token", False),
        ("label_key", False),
        ("key", False),
        ("monkey", False),
        ("keep", False),
        ("sasquatch", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert masking.is_secret_name(name) is secret
    assert (masking.mask({"a": {name: "x"}}) == {"a": {name: "***"}}) is secret


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        ("https://user:pass@host/x", True),
        ("DefaultEndpointsProtocol=https;AccountKey=abc", True),
        ("https://a.blob.core.windows.net/c?sv=1&sig=abc", True),
        ("https://host:8080/x", False),
        ("abfss://container@account.dfs.core.windows.net/x", False),
        ("/plain/path", False),
    ],
)
def test_values_that_are_secrets(value: str, masked: bool) -> None:
    assert (masking.mask({"root": value}) == {"root": "***"}) is masked


# --- no side effects -------------------------------------------------------------------------------------------------


def test_the_hydra_of_the_caller_is_unchanged(tmp_path: Path) -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    write(tmp_path, {"theirs.yaml": "x: 1\n"})
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        ConfigStore.instance().store(name="config", node={"strictly": "theirs"})
        try:
            mine = GlobalHydra.instance().hydra
            assert compose(["trainer.epochs=2"]).job.trainer.epochs == 2
            with pytest.raises(ConfigError):
                compose(["trainer.epoch=2"])
            assert GlobalHydra.instance().hydra is mine
            assert hydra.compose("theirs") == {"x": 1}
            assert hydra.compose("config") == {"strictly": "theirs"}
            assert str(hydra.version.getbase()) == "1.2"
            assert "launch_schema.yaml" not in ConfigStore.instance().repo
        finally:
            ConfigStore.instance().repo.pop("config.yaml")


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose(["experiment=mnist_tiny"])
    assert list(tmp_path.iterdir()) == []


def test_composition_imports_neither_torch_nor_ray_and_the_schema_not_even_hydra() -> None:
    code = (
        "import sys; from launcher.config import Job, check_values, sources;"
        "assert not {'hydra', 'omegaconf'} & set(sys.modules);"
        "from launcher.config import compose;"
        "compose(['trainer.epochs=2']); assert not {'torch', 'ray', 'models', 'conf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent, timeout=240)
