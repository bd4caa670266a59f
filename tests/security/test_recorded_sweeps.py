"""A sweep's journal is data: its overrides do not choose code or clusters, and no pickle in it is read."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from launcher.clusters.local.kind import LocalCluster
from launcher.config import SweepConfig
from launcher.errors import RunError, TrustError
from launcher.jobs.prepare import Request
from launcher.runs import user_state
from launcher.sweeps import algorithms, search
from launcher.sweeps.space import IntervalAxis, SearchSpace
from launcher.sweeps.specification import read_sweep, save_user_record
from launcher.sweeps.study import JOURNAL, read_record


def _journal(directory: Path, words: Any, config_dir: str | None = None) -> optuna.Study:
    directory.mkdir(parents=True)
    (directory / "config.yaml").touch()
    storage = JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
    study = optuna.create_study(study_name=directory.name, storage=storage)
    study.set_user_attr("words", words)
    study.set_user_attr("config_dir", config_dir)
    return study


def test_recorded_words_choose_neither_code_nor_a_cluster(tmp_path: Path) -> None:
    words = ["optimizer.lr=1e-3,1e-2", "trust=[os]", "cluster=existing", "+cluster.address=http://h:1", "vars.x=1"]
    words += ["cluster.keep_minutes=1", "++cluster={env: [HOME]}"]
    _journal(tmp_path / "theirs", words, config_dir="/somewhere")
    lines: list[str] = []
    spec = read_sweep(Request(["run.name=theirs", "run.resume=true", f"run.root={tmp_path}"], note=lines.append))
    job = spec.first.job
    assert (job.trust, job.cluster, job.vars) == ([], LocalCluster(keep_minutes=1), {"x": 1})
    assert spec.compose({"optimizer.lr": 1e-2}).job.cluster.kind == "local"
    assert spec.request.config_dir is None
    assert len(lines) == 1
    for word in ("trust=[os]", "cluster=existing", "address", "--config-dir /somewhere"):
        assert word in lines[0]
    typed = ["run.name=theirs", "run.resume=true", f"run.root={tmp_path}", "trust=[mine]", "cluster=none"]
    job = read_sweep(Request(typed)).first.job
    assert (job.trust, job.cluster.kind) == (["mine"], "none")


def test_the_users_own_sweep_keeps_its_words(tmp_path: Path) -> None:
    start = ["optimizer.lr=1e-3,1e-2", "trust=[mine]", "cluster=existing", "cluster.address=h:1", "run.name=mine"]
    spec = read_sweep(Request([*start, f"run.root={tmp_path}"]))
    _journal(tmp_path / "mine", [word for word in start if not word.startswith("run.")])
    user_state.record_cluster(spec.directory, {"kind": "existing", "address": "h:1"})
    save_user_record(spec)
    lines: list[str] = []
    request = Request(["run.name=mine", "run.resume=true", f"run.root={tmp_path}"], note=lines.append)
    again = read_sweep(request)
    job = again.first.job
    assert (job.trust, job.cluster.kind, asdict(job.cluster)["address"], lines) == (["mine"], "existing", "h:1", [])
    assert "trust=[mine]" in again.request.words  # for the head of a cluster, which has no record
    save_user_record(again)
    assert read_sweep(request).first.job == job


@pytest.mark.parametrize("params", ["trust: '[os]'", "cluster: ssh", "cluster.env: '[HOME]'"])
def test_a_sweep_in_a_file_chooses_neither_code_nor_a_cluster(params: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\nhydra: {{sweeper: {{params: {{optimizer.lr: '1e-3,1e-2', {params}}}}}}}\n"
    (tmp_path / "experiment/evil.yaml").write_text(text)
    with pytest.raises(TrustError):
        read_sweep(Request(["experiment=evil", f"run.root={tmp_path}"], tmp_path))
    word = "trust=[os]" if "trust" in params else "cluster=ssh" if "ssh" in params else "cluster.env=[HOME]"
    assert read_sweep(Request(["experiment=evil", word, f"run.root={tmp_path}"], tmp_path)).total == 2


@pytest.mark.parametrize("words", [3, "trust=[os]", [3], [["a"]], {"a": 1}, ["a=1"] * 100_000])
def test_invalid_overrides_in_a_journal(words: Any, tmp_path: Path) -> None:
    _journal(tmp_path / "s", words)
    with pytest.raises(RunError, match=r"study\.journal"):
        read_record(tmp_path / "s")


@pytest.mark.parametrize(
    "line", ["[" * 100_000 + "]" * 100_000, '{"op_code": ' + "9" * 5000 + "}", "[]", "null", '{"op_code": 77}']
)
def test_invalid_lines_in_a_journal(line: str, tmp_path: Path) -> None:
    _journal(tmp_path / "s", [])
    with (tmp_path / "s" / JOURNAL).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=r"study\.journal"):
        read_record(tmp_path / "s")


# ---- the state of a search -------------------------------------------------------------------------------------------


class _Mark:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


SETTINGS = SweepConfig(sampler="cmaes", trials=50)
WORDS = SearchSpace((), (IntervalAxis("vars.x", 0.0, 1.0), IntervalAxis("vars.y", 0.0, 1.0)))


def _search(study: optuna.Study, trials: int, resumes: bool) -> list[tuple[float, float]]:
    """Return the drawn parameters. resumes: use a new sampler for each trial, as after a resume."""
    study.sampler = algorithms.sampler(SETTINGS, WORDS, 0)
    drawn = []
    for _ in range(trials):
        if resumes:
            study.sampler = algorithms.sampler(SETTINGS, WORDS, 0)
        trial = study.ask(search.distributions(WORDS, grid=False))
        drawn.append((trial.params["vars.x"], trial.params["vars.y"]))
        study.tell(trial, (trial.params["vars.x"] - 0.7) ** 2 + (trial.params["vars.y"] - 0.2) ** 2)
    return drawn


def test_no_pickle_of_a_journal_is_read(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    study = _journal(tmp_path / "theirs", [])
    _search(study, 2, resumes=False)
    trial = study.ask(search.distributions(WORDS, grid=False))
    study._storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", pickle.dumps(_Mark(mark)).hex())
    study.tell(trial, 0.5)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "theirs" / JOURNAL)))
    loaded = optuna.load_study(study_name="theirs", storage=storage)
    _search(loaded, 3, resumes=False)
    assert not mark.exists()


def test_a_search_learns_without_stored_state(tmp_path: Path) -> None:
    """The state follows from the trials: a search that is resumed after every trial converges as well."""
    means = []
    for name, resumes in (("whole", False), ("resumed", True)):
        study = _journal(tmp_path / name, [])
        _search(study, 60, resumes)
        last = [trial.params for trial in study.get_trials(deepcopy=False)[-15:]]
        means.append([sum(params[key] for params in last) / len(last) for key in ("vars.x", "vars.y")])
        assert "optimizer" not in (tmp_path / name / JOURNAL).read_text()
    for mean in means:
        assert mean == pytest.approx([0.7, 0.2], abs=0.15), json.dumps(means)
