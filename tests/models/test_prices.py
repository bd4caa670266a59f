"""models/prices.py: the loss, the network, its metrics, and the experiment `prices` from the command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from models.prices import PatchTransformer, pinball
from tests.support.command import Place
from tests.support.engine_ranks import column, make_job, succeed

LEVELS = [0.1, 0.5, 0.9]
SHAPE = {"quantiles": LEVELS, "horizons": 4, "context": 16, "patch": 4, "width": 8}


def network(**options: Any) -> PatchTransformer:
    """Return a small network in evaluation mode, whose forecasts differ from `base`."""
    torch.manual_seed(0)
    model = PatchTransformer(**{**SHAPE, **options}).eval()
    for layer in (model.head, model.shortcut):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model


def batch(size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    base = 0.02 * torch.randn(size, 4, 3, generator=generator).sort(-1).values
    return {
        "x": torch.randn(size, 16, 10, generator=generator),
        "base": base,
        "constant": 1.5 * base,
        "y": 0.02 * torch.randn(size, 4, generator=generator),
        "past": 0.01 * torch.randn(size, 16, generator=generator),
        "close": torch.tensor([100.0, 2506.850098, 0.000123][:size], dtype=torch.float64),
        "time": torch.tensor([0, 17896 * 86400, 1546300800 + 34200][:size]),
    }


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "quantile", "y", "loss"),
    [(0.9, 1.0, 3.0, 1.8), (0.9, 3.0, 1.0, 0.2), (0.1, 1.0, 3.0, 0.2), (0.5, -1.0, 1.0, 1.0), (0.3, 2.0, 2.0, 0.0)],
)
def test_pinball_by_hand(level: float, quantile: float, y: float, loss: float) -> None:
    """The loss is level x error above the quantile, and (1 - level) x error below it."""
    found = pinball(torch.tensor([[quantile]]), torch.tensor([y]), torch.tensor([level]))
    assert found.item() == pytest.approx(loss, abs=1e-7)


def test_pinball_is_smallest_at_the_quantile() -> None:
    y = torch.linspace(0, 100, 1001)
    losses = [pinball(torch.full((1001, 1), float(q)), y, torch.tensor([0.9])).mean() for q in range(101)]
    assert int(torch.stack(losses).argmin()) == 90


def test_the_loss_has_one_value_per_forecast_in_percent() -> None:
    model, one = network().requires_grad_(False), batch()
    answer = model.training_step(one)
    assert answer.keys() == {"loss"}
    assert answer["loss"].shape == (3, 4, 3)
    quantiles = model(one["x"], one["base"])
    error = float(one["y"][2, 1] - quantiles[2, 1, 0])
    assert answer["loss"][2, 1, 0].item() == pytest.approx(100 * max(0.1 * error, -0.9 * error), rel=1e-5)


def test_metrics_of_validation() -> None:
    model, one = network().requires_grad_(False), batch()
    answer = model.validation_step(one)
    quantiles = model(one["x"], one["base"])
    assert answer["median_error"].mean() == pytest.approx(100 * (one["y"] - quantiles[..., 1]).abs().mean())
    assert answer["persistence_error"].mean() == pytest.approx(100 * one["y"].abs().mean())
    inside = (quantiles[..., 0] <= one["y"]) & (one["y"] <= quantiles[..., 2])
    assert answer["inside"].mean() == pytest.approx(inside.float().mean())
    for name in ("base", "constant"):
        loss = 100 * pinball(one[name], one["y"], torch.tensor(LEVELS))
        assert answer["ewma" if name == "base" else name].mean() == pytest.approx(loss.mean())
    totals = {name: (value.double().sum(), float(value.numel())) for name, value in answer.items()}
    ratios = model.summarize(totals)
    assert ratios["ratio_ewma"] == pytest.approx((answer["loss"].mean() / answer["ewma"].mean()).item())
    assert ratios["ratio_constant"] == pytest.approx((answer["loss"].mean() / answer["constant"].mean()).item())


# ---- the network ----------------------------------------------------------------------------------------------------


def test_the_initial_network_equals_the_baseline() -> None:
    one = batch()
    model = PatchTransformer(**SHAPE).eval()  # type: ignore[arg-type]
    assert torch.equal(model(one["x"], one["base"]), one["base"])


def test_quantiles_never_cross_and_depend_on_every_row() -> None:
    model, one = network(), batch()
    quantiles = model(10 * one["x"], one["base"])
    assert (quantiles.diff(dim=-1) > 0).all()
    x = one["x"].clone().requires_grad_()
    model(x, one["base"]).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum((0, 2)) > 0).all()


def test_the_network_learns_the_volatility() -> None:
    """Thirty steps are enough to learn that returns are twice as wide after one sign than after the other."""
    torch.manual_seed(0)
    model = PatchTransformer(**SHAPE, dropout=0.0)  # type: ignore[arg-type]
    x = torch.randn(64, 16, 10)
    wide = 1 + (x[:, -1, 3] > 0).float()
    one = {"x": x, "base": 0.01 * torch.tensor([-1.28, 0.0, 1.28]).expand(64, 4, 3)}
    one["y"] = 0.01 * wide[:, None] * torch.randn(64, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = model.training_step(one)["loss"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("depth", [1, 3])
def test_flops_agree_with_the_count_of_pytorch(depth: int) -> None:
    model, one = network(depth=depth, context=24), batch()
    x = torch.randn(3, 24, 10)
    with FlopCounterMode(display=False) as counter:
        model(x, one["base"])
    attention = depth * 2 * 2 * 6 * 6 * 8 * 3  # the counter does not see it on CPUs
    shape = 2 * 2 * 4 * 3  # level and slope times their shapes over the horizon, which are not a layer
    counted = counter.get_total_flops()
    assert model.flops_per_sample * 3 in (3 * (counted - shape), 3 * (counted - shape + attention))


def test_default_size() -> None:
    """The figure in conf/model/prices.yaml."""
    assert sum(p.numel() for p in PatchTransformer().parameters()) == 4918


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patch": 5}, "patch=5"), ({"heads": 3}, "heads=3"), ({"patch": 0}, "patch=0")],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_data_of_another_shape_are_rejected() -> None:
    with pytest.raises(ValueError, match=r" 16 .* 10 .* 4 .* 3 .*\(3, 8, 10\)"):
        network().training_step({**batch(), "x": torch.zeros(3, 8, 10)})


# ---- predictions ---------------------------------------------------------------------------------------------------


def test_predictions_are_prices() -> None:
    model, one = network(), batch()
    del one["y"], one["constant"]
    found = model.predict_step(one)
    assert json.loads(json.dumps(found)) == found
    assert [answer["date"] for answer in found] == ["1970-01-01", "2018-12-31", "2019-01-01 09:30:00"]
    assert found[1]["price"] == 2506.850098
    assert found[1]["horizons"] == [1, 2, 3, 4]
    quantiles = model(one["x"], one["base"])
    assert list(found[1]["quantiles"]) == ["0.1", "0.5", "0.9"]
    for q, level in enumerate(LEVELS):
        by_hand = [2506.850098 * math.exp(value) for value in quantiles[1, :, q].tolist()]
        assert found[1]["quantiles"][str(level)] == pytest.approx(by_hand, rel=1e-6)
    assert found[2]["quantiles"]["0.9"][0] == pytest.approx(0.000123 * quantiles[2, 0, 2].exp().item(), rel=1e-5)


def test_crossing_quantiles_are_put_in_order() -> None:
    one = batch()
    one["base"] = one["base"].flip(-1)
    low, middle, high = (
        np.array([answer["quantiles"][str(q)] for answer in network().predict_step(one)]) for q in LEVELS
    )
    assert (low < middle).all()
    assert (middle < high).all()


@pytest.mark.parametrize("size", [1, 3])
def test_examples_draw_the_forecast_and_the_actual_prices(size: int) -> None:
    figure = network().requires_grad_(False).examples(batch(size))["forecasts"]
    assert isinstance(figure, Figure)
    assert len(figure.axes) == size
    lines = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines]
    actual = 100 * np.exp([0, *batch(size)["y"][0].tolist()])
    assert sum(line == pytest.approx(actual) for line in lines) == 1, "the actual prices are one of two curves"
    assert len(lines) >= 2


# ---- as a job -------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: int = 500) -> Path:
    noise = np.random.RandomState(0).standard_normal(rows)
    dates = pandas.date_range("2000-01-01", periods=rows)
    frame = pandas.DataFrame({"date": dates, "close": 100 * np.exp(np.cumsum(0.01 * noise))})
    frame.to_csv(folder / "prices.csv", index=False)
    return folder / "prices.csv"


DATA = {"horizons": 4, "context": 16, "quantiles": LEVELS, "values": ["close"], "split": "2001-03-01"}


@pytest.mark.parametrize("exact", [False, True])
def test_two_workers_have_the_losses_of_one(tmp_path: Path, exact: bool) -> None:
    """A second run has the same losses bit for bit; in deterministic mode, so has any number of workers."""
    job = make_job(
        model={"_target_": "models.prices.PatchTransformer", **SHAPE, "dropout": 0.0},
        data={"_target_": "models.prices_data.Table", "path": str(write(tmp_path)), **DATA},
        epochs=1,
        global_batch_size=41,
        deterministic=exact,
    )
    found = {}
    for name, workers in (("one", 1), ("two", 2)) if exact else (("one", 1), ("two", 2), ("again", 2)):
        succeed(job, tmp_path / name, workers)
        tags = ("train/loss", "train/grad_norm", "val/loss", "val/ratio_ewma", "val/median_error")
        found[name] = [column(tmp_path / name, tag) for tag in tags]
        assert len(found[name][0]) > 3
    assert found["one" if exact else "again"] == found["two"]
    for one, two in zip(found["one"], found["two"], strict=True):
        assert two == pytest.approx(one, rel=1e-5)


SHORT = ("trainer.steps=4", "trainer.global_batch_size=50", "trainer.evaluate_every=2", "run.name=a")
WORDS = ("experiment=prices", "cluster=none", "logging.graph=false")


def test_experiment_trains_and_predicts(here: Place, tmp_path: Path) -> None:
    path = write(tmp_path)
    words = ("data=table", f"data.path={path}", "data.split=2001-03-01", "data.context=16", "data.horizons=4")
    done = here.here(*WORDS, *words, "model.width=8", *SHORT)
    assert done.status == 0, done.err
    metrics = here.result("a")["metrics"]
    assert {"val/loss", "val/ewma", "val/constant", "val/ratio_ewma", "val/ratio_constant"} <= metrics.keys()
    assert metrics["val/ratio_ewma"] == pytest.approx(metrics["val/loss"] / metrics["val/ewma"])
    assert "examples" not in done.err
    done = here.here("predict", "a", f"input={path}")
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    forecast = json.loads(line)
    assert (forecast["input"], forecast["date"]) == (str(path), "2001-05-14")
    assert [len(prices) for prices in forecast["quantiles"].values()] == [4] * 7


def test_debug_fast_runs_on_the_indices(here: Place) -> None:
    done = here.here(*WORDS, "debug=fast", "run.name=a")
    assert done.status == 0, done.err
    assert here.result("a")["steps"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("date,close", "date,price"), r"prices\.csv .*'close'.* date, price\b"),
        (lambda text: text + "2001-05-14,100\n", r"prices\.csv, row 502: date .* 2001-05-14\b"),
        (lambda text: text.replace("2000-01-03,", "2000-01-03,-"), r"prices\.csv, row 4: close "),
        (lambda text: text[:3000], r"prices\.csv: 101 .*\(data\.split .* 292 .*data\.context=16\b"),
    ],
)
def test_a_bad_table_is_exit_2(here: Place, tmp_path: Path, change: Any, message: str) -> None:
    path = write(tmp_path)
    path.write_text(change(path.read_text()))
    done = here.here(*WORDS, "data=table", f"data.path={path}", "data.split=2001-03-01", "data.context=16")
    assert done.status == 2
    printed = " ".join(done.err.split())
    assert str(path) in printed
    assert re.search(message, printed)
    assert not here.runs.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prices_reach_their_target(place: Place, seed: int) -> None:
    """With any seed, the final loss on held-out years is at most 0.99 times that of the scaled quantiles.

    The loss of the last step is used, because the best step is selected by the same data.
    """
    words = ("experiment=prices", "scaling.workers=2", f"trainer.seed={seed}", "run.name=a")
    done = place.launch(*words, seconds=900)
    assert done.status == 0, done.err
    result = place.result("a")
    assert result["metrics"]["val/ratio_ewma"] <= 0.99
    assert result["metrics"]["val/ewma"] < 0.96 * result["metrics"]["val/constant"]
    assert result["seconds"] < 900
    exported = place.launch("export", "a")
    assert exported.status == 0, exported.err
    (program,) = (place.runs / "a").rglob("*.pt2")
    assert torch.export.load(program).range_constraints, "the program takes batches of one size only"
