"""Settings of Hydra without effect in launch are errors that name what to use instead, in words and in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import compose
from launcher.errors import ConfigError, LaunchError

SETTINGS = [
    ("hydra.run.dir=out", "hydra: {run: {dir: out}}", "run.root"),
    ("hydra.sweep.dir=out", "hydra: {sweep: {dir: out}}", "run.root"),
    ("hydra.job.chdir=true", "hydra: {job: {chdir: true}}", "hydra.job.chdir"),
    ("hydra.mode=MULTIRUN", "hydra: {mode: MULTIRUN}", "-m"),
    ("hydra.sweeper.n_trials=20", "hydra: {sweeper: {n_trials: 20}}", "sweep.trials"),
    ("hydra/sweeper=optuna", "defaults: [override /hydra/sweeper: optuna]", "sweep=grid"),
    ("hydra/launcher=ray", "defaults: [override /hydra/launcher: ray]", "cluster=NAME"),
    ("hydra.launcher.n_jobs=4", "hydra: {launcher: {n_jobs: 4}}", "cluster=NAME"),
    ("hydra.verbose=true", "hydra: {verbose: true}", "verbose=true"),
    ("hydra.anything=1", "hydra: {anything: 1}", "hydra.anything"),
]


@pytest.mark.parametrize(("word", "text", "remedy"), SETTINGS, ids=[word for word, _, _ in SETTINGS])
def test_a_word_and_a_file(word: str, text: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        compose([word])
    assert remedy in str(raised.value)
    assert raised.value.key == word.partition("=")[0]
    for file in ("experiment/a.yaml", "local/default.yaml", "config.yaml"):
        if file == "config.yaml" and "defaults" in text:
            text = "defaults: [launch_schema, _self_, override hydra/" + text.partition("/hydra/")[2]
        path = tmp_path / file.partition("/")[0] / file
        path.parent.mkdir(parents=True)
        path.write_text(f"# @package _global_\n{text}\n")
        with pytest.raises(LaunchError) as rejected:
            compose(["experiment=a"] if "experiment" in file else [], tmp_path / file.partition("/")[0])
        assert remedy in str(rejected.value), file
        assert str(path) in str(rejected.value), file


def test_the_sweep_of_a_file_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/a.yaml").write_text(
        "# @package _global_\ndefaults: [mnist_tiny, override /hydra/sweeper: launch]\n"
        "hydra: {sweeper: {params: {optimizer.lr: '0.1,0.2'}}}\n"
    )
    assert compose(["experiment=a"], tmp_path).sweeper["params"] == {"optimizer.lr": "0.1,0.2"}


@pytest.mark.parametrize("name", ["job.num", "job.override_dirname", "runtime.output_dir"])
def test_references_to_values_that_launch_does_not_have(name: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/a.yaml").write_text(f"# @package _global_\nvars: {{x: '${{hydra:{name}}}'}}\n")
    for words in ([f"+vars.x=${{hydra:{name}}}"], ["experiment=a"]):
        with pytest.raises(ConfigError, match=rf"vars\.x.*hydra:{name}"):
            compose(words, tmp_path)


def test_other_references_to_hydra() -> None:
    job = compose(["+vars.cwd=${hydra:runtime.cwd}", "+vars.model=${hydra:runtime.choices.model}", "model=mlp"]).job
    assert (job.vars["cwd"], job.vars["model"]) == (str(Path.cwd()), "mlp")


def test_the_resolver_of_the_caller_is_restored() -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import setup_globals
    from omegaconf import OmegaConf

    setup_globals()
    compose([])
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": {"job": {"num": 3}}})  # type: ignore[assignment]
    try:
        assert OmegaConf.create({"x": "${hydra:job.num}"}).x == 3
    finally:
        HydraConfig.instance().cfg = None
