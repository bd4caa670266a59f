"""`launch evaluate`, `predict` and `export` of a trained run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine.inference import plain
from launcher.errors import UserCodeError
from tests.support.command import TOY, Place, Result

RUN = ("run.name=a", "trainer.steps=2")


@pytest.fixture
def run(here: Place) -> Place:
    """A run `a` of a linear model."""
    assert here.here(*TOY, *RUN).status == 0
    return here


def refused(result: Result, message: str) -> None:
    assert (result.status, result.out) == (2, ""), result.err
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err


# ---- evaluating -----------------------------------------------------------------------------------------------------


def test_evaluate(here: Place) -> None:
    assert here.here(*TOY, "run.name=a").status == 0
    done = here.here("evaluate", "a")
    assert done.status == 0
    assert json.loads(done.out) == {"val/loss": pytest.approx(here.result("a")["best"]["value"], rel=1e-5)}
    over = here.here("evaluate", "a", "trainer.precision=bfloat16")
    assert over.status == 0
    assert "Over the run's own configuration: trainer.precision=bfloat16" in over.err
    entries = [json.loads(line) for line in (here.runs / "a/evaluations.jsonl").read_text().splitlines()]
    assert [entry["words"] for entry in entries] == [[], ["trainer.precision=bfloat16"]]
    assert [entry["step"] for entry in entries] == [8, 8]
    assert [entry["val/loss"] for entry in entries] == [json.loads(one.out)["val/loss"] for one in (done, over)]
    assert 0 < entries[0]["time"] < entries[1]["time"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate b", r'no run "b".*'),
        ("evaluate a model.width=2", r"another model"),
        ("evaluate a model=mlp", r"another model"),
        ("predict a model.width=2 input=x", r"another model"),
        ("export a model.width=2", r"another model"),
        (
            "evaluate a --config-dir own data=two",
            r'run "a" does not fit data._target_=toy.TwoNumbers: .*shapes cannot be',
        ),
        ("evaluate a/../a", r"plain directory name"),
        ("evaluate a foo=1", r'no key "foo"'),
        ("--config-dir own run.name=a run.resume=true data=two", r"cannot be continued with another data"),
        ("run.name=a run.resume=true model.width=2", r"cannot be continued with another model"),
    ],
)
def test_incompatible_overrides_are_rejected(run: Place, words: str, message: str) -> None:
    refused(run.here(*words.split()), message)
    assert not (run.runs / "a/evaluations.jsonl").exists()
    assert not (run.runs / "a/export").exists()


def test_evaluate_on_other_data_of_the_same_kind(run: Place) -> None:
    done = run.here("evaluate", "a", "data.samples=3")
    assert done.status == 0
    assert json.loads(done.out).keys() == {"val/loss"}


# ---- predicting -----------------------------------------------------------------------------------------------------


def numbers(place: Place, *rows: object) -> str:
    (place.runs / "given.txt").write_text("\n".join(map(str, rows)))
    return "input=runs/given.txt"


def line_of(place: Place) -> tuple[float, float]:
    from launcher.engine.checkpoint import load_weights

    weights = load_weights(place.runs / "a/checkpoints/step-00000002")
    return float(weights["net.weight"]), float(weights["net.bias"])


def test_every_input_is_a_line_of_json(run: Place) -> None:
    done = run.here("predict", "a", numbers(run, *range(150)), "trainer.global_batch_size=40")
    assert done.status == 0, done.err
    found = [json.loads(line) for line in done.out.splitlines()]
    weight, bias = line_of(run)
    assert [line["input"] for line in found] == [f"row {number}" for number in range(1, 151)]
    expected = [weight * x + bias for x in range(150)]
    assert [line["prediction"] for line in found] == pytest.approx(expected, abs=1e-5)
    assert "Predicting with" in done.err
    assert run.result("a")["status"] == "completed"  # predict does not change the run


def test_a_mapping_is_merged_with_the_name_of_its_input(here: Place) -> None:
    assert here.here(*TOY, *RUN, "model.predicts=mapping", "callbacks=ema").status == 0
    done = here.here("predict", "a", numbers(here, 2))
    weight, bias = line_of(here)  # the averages
    (found,) = [json.loads(line, parse_constant=pytest.fail) for line in done.out.splitlines()]
    assert found == {"input": "row 1", "y": pytest.approx(2 * weight + bias), "sure": None, "more": [1, "a", None]}


@pytest.mark.parametrize(
    ("words", "rows", "message"),
    [
        ("predict a", [1], r"launch predict a input=PATH"),
        ("predict a input=", [1], r"cannot be read|no key|input=PATH"),
        ("predict a input=nowhere.txt", [1], r"No such file or directory.*nowhere.txt"),
        ("predict a input=runs/given.txt", [], r"input=runs/given.txt contains nothing that"),
        ("predict a input=runs/given.txt", ["one"], r"given.txt, row 1: expected a number, found 'one'"),
        (
            "predict a input=runs/given.txt --config-dir own data=two",
            [1],
            r"toy.TwoNumbers cannot read inputs.*inputs\(path\)",
        ),
        ("predict input=runs/given.txt", [1], r"needs the name of a run"),
        ("evaluate a input=runs/given.txt", [1], r'no key "input"'),
    ],
)
def test_missing_or_damaged_inputs_are_errors(run: Place, words: str, rows: list[Any], message: str) -> None:
    numbers(run, *rows)
    refused(run.here(*words.split()), message)


@pytest.mark.parametrize(
    ("predicts", "status", "message"),
    [
        ("unfit", 2, r"a line takes one number, not 3 of them"),
        ("few", 1, r"list of one value for each of its 3 inputs; found 1"),
        ("object", 1, r"returned a object, which has no JSON form"),
        ("raise", 1, r"KeyError: 'label'"),
    ],
)
def test_errors_of_predict_step(here: Place, predicts: str, status: int, message: str) -> None:
    assert here.here(*TOY, *RUN, f"model.predicts={predicts}").status == 0
    done = here.here("predict", "a", numbers(here, 1, 2, 3))
    assert (done.status, done.out) == (status, "")
    assert re.search(message, done.err), done.err


def test_inputs_before_a_bad_one_are_predicted(run: Place) -> None:
    done = run.here("predict", "a", numbers(run, 1, 2, 3, "x"), "trainer.microbatch_size=2")
    assert done.status == 2
    assert [json.loads(line)["input"] for line in done.out.splitlines()] == ["row 1", "row 2"]
    assert "given.txt, row 4" in done.err


def test_values_that_json_does_not_support() -> None:
    assert plain({1: (torch.ones(2), torch.tensor(float("inf")), True)}) == {"1": [[1.0, 1.0], None, True]}
    with pytest.raises(UserCodeError, match="a set"):
        plain([{1}])


# ---- exporting ------------------------------------------------------------------------------------------------------

_USE = """
import sys, torch
from safetensors.torch import load_file
network = torch.export.load(sys.argv[1] + "/network.pt2").module()
weights = load_file(sys.argv[1] + "/weights.safetensors")
for count in (1, 2, 77):
    x = torch.randn(count, 1)
    torch.testing.assert_close(network(x), x @ weights["net.weight"].T + weights["net.bias"])
assert "launcher" not in sys.modules and "toy" not in sys.modules
"""


def test_an_exported_network_is_usable_without_launch(run: Place, tmp_path: Path) -> None:
    done = run.here("export", "a")
    assert (done.status, done.out) == (0, f"{run.runs / 'a/export'}\n"), done.err
    assert sorted(file.name for file in (run.runs / "a/export").iterdir()) == ["network.pt2", "weights.safetensors"]
    assert "for batches of any size; its outputs equal those of the network" in done.err
    used = subprocess.run(
        [sys.executable, "-c", _USE, done.last], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert used.returncode == 0, used.stderr
    # Another run can load the exported weights.
    begun = run.here(*TOY, "run.name=b", f"checkpoint.load='{done.last}/weights.safetensors'", "trainer.steps=1")
    assert begun.status == 0, begun.err


def test_a_network_that_cannot_be_exported_leaves_its_weights(here: Place) -> None:
    assert here.here(*TOY, *RUN, "model.traceable=false").status == 0
    (here.runs / "a/export").mkdir()
    (here.runs / "a/export/network.pt2").write_text("of an earlier export")
    done = here.here("export", "a")
    assert (done.status, done.last) == (1, str(here.runs / "a/export"))
    assert "cannot be exported" in done.err
    assert "Traceback" not in done.err
    assert [file.name for file in (here.runs / "a/export").iterdir()] == ["weights.safetensors"]
