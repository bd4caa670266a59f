"""models/prices_data.py: windows, a split without leaks, and baselines computed by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from models import prices_data
from models.prices_data import LOOKBACK, Indices, Table, Windows, ewma_volatility

DAY = 86400
START = "2000-01-01"


@pytest.fixture(scope="module")
def indices() -> Indices:
    return Indices()


def walk(rows: int, seed: int = 0) -> np.ndarray:
    noise = np.random.RandomState(seed).standard_normal(rows)
    return 100 * np.exp(np.cumsum(0.01 * noise))


def table(folder: Path, prices: dict[str, np.ndarray], **options: Any) -> Table:
    frame = pandas.DataFrame(prices)
    frame.insert(0, "date", pandas.date_range(START, periods=len(frame)))
    frame.to_csv(folder / "prices.csv", index=False, float_format="%.17g")
    given = {"context": 8, "horizons": 5, "quantiles": [0.1, 0.5, 0.9], "values": list(prices), "split": "2001-05-01"}
    return Table(str(folder / "prices.csv"), **{**given, **options})


def everything(part: Windows) -> dict[str, torch.Tensor]:
    return part.__getitems__(range(len(part)))


def test_last_three_years_of_both_indices_are_held_out(indices: Indices) -> None:
    assert (len(indices.train), len(indices.val)) == (7748, 1470)
    assert np.bincount(indices.val.series.numpy()).tolist() == [735, 735]
    newest = everything(indices.val)
    last = indices.val.times[indices.val.rows.max() + indices.horizons]
    assert str(np.datetime64(int(last), "s"))[:10] == "2018-12-31", "the last price is not a target"
    first = newest["time"].min()
    assert str(np.datetime64(int(first), "s"))[:10] == "2015-12-31", "the first target must be the first held-out day"
    assert newest["close"][0].item() == 2043.939941


@pytest.mark.parametrize("end", [None, "2017-01-01"])
def test_targets_of_training_and_validation_do_not_overlap(indices: Indices, end: str | None) -> None:
    data = indices if end is None else Indices(end=end)
    split = np.datetime64("2016-01-01", "s").astype(int)
    ahead = torch.arange(1, data.horizons + 1)
    train, val = (part.times[part.rows[:, None] + ahead] for part in (data.train, data.val))
    assert train.max() < split <= val.min()
    if end is not None:
        assert val.max() < np.datetime64(end, "s").astype(int)
    for part in (data.train, data.val):  # a window stays within its series
        series = torch.cat([torch.full((5031,), 0), torch.full((5031,), 1)])
        oldest = part.rows - data.context - LOOKBACK + 1
        assert torch.equal(series[oldest], part.series)
        assert torch.equal(series[part.rows + data.horizons], part.series)


def test_training_does_not_depend_on_rows_after_the_split(tmp_path: Path) -> None:
    """Guards against a target, a fitted quantile or a scale of training that uses held-out rows."""
    prices = walk(700)
    known = table(tmp_path, {"close": prices})
    cut = int((np.datetime64("2001-05-01") - np.datetime64(START)).astype(int))
    other = table(tmp_path, {"close": np.concatenate([prices[:cut], 3 * walk(700 - cut, seed=1)])})
    a, b = everything(known.train), everything(other.train)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert np.array_equal(known.scaled, other.scaled)
    x, y = everything(known.val), everything(other.val)
    assert torch.equal(x["constant"], y["constant"])
    assert not torch.equal(x["y"], y["y"])


def test_a_window_depends_only_on_its_past(tmp_path: Path) -> None:
    """The inputs of a model do not change when all rows after its origin change."""
    prices = walk(700)
    known = table(tmp_path, {"close": prices})
    n = 40
    origin = int(known.val.rows[n])
    changed = prices.copy()
    changed[origin + 1 :] *= np.linspace(1.5, 3, 700 - origin - 1)
    other = table(tmp_path, {"close": changed})
    for key in ("x", "base", "past", "close", "time", "constant"):
        assert torch.equal(known.val[n][key], other.val[n][key]), key
    assert not torch.equal(known.val[n]["y"], other.val[n]["y"])


def test_targets_are_log_returns(tmp_path: Path) -> None:
    prices = walk(700)
    val = table(tmp_path, {"close": prices}).val
    row = int(val.rows[7])
    assert val[7]["y"].numpy() == pytest.approx(np.log(prices[row + 1 : row + 6] / prices[row]), abs=1e-7)
    assert val[7]["past"].numpy() == pytest.approx(np.log(prices[row - 7 : row + 1] / prices[row]), abs=1e-7)
    assert val[7]["time"] == np.datetime64(START, "s").astype(int) + row * DAY


def test_volatility_by_hand() -> None:
    returns = np.array([0, 0.01, -0.03, 0.02])
    start = (0.01**2 + 0.03**2 + 0.02**2) / 3
    one = 0.9 * start + 0.1 * 0.01**2
    two = 0.9 * one + 0.1 * 0.03**2
    three = 0.9 * two + 0.1 * 0.02**2
    assert ewma_volatility(returns, 0.9) == pytest.approx(np.sqrt([start, one, two, three]))


def test_baselines_by_hand(tmp_path: Path) -> None:
    """Quantiles of the scaled returns of all series and training rows, per horizon, times s and sqrt(h)."""
    prices = {"a": walk(700), "b": walk(700, seed=1) ** 2}
    data = table(tmp_path, prices, decay=0.9)
    cut = 486  # 2001-05-01
    scaled: list[float] = []
    volatility, returns = {}, {}
    for name, price in prices.items():
        r = np.concatenate([[0], np.diff(np.log(price))])
        variance = [(r[1:23] ** 2).mean()]
        for value in r[1:]:
            variance.append(0.9 * variance[-1] + 0.1 * value**2)
        volatility[name] = np.sqrt(variance)
        origins = range(22, cut - 5)  # from the first row with enough earlier returns
        returns[name] = [np.log(price[o + 3] / price[o]) for o in origins]
        scaled += [y / volatility[name][o] / 3**0.5 for y, o in zip(returns[name], origins, strict=True)]
    z = np.quantile(scaled, [0.1, 0.5, 0.9])
    for n in (0, 150, len(data.val) - 1):  # of a, of a, of b
        name = "ab"[int(data.val.series[n])]
        s = volatility[name][int(data.val.rows[n]) - 700 * int(data.val.series[n])]
        assert data.val[n]["base"][2].numpy() == pytest.approx(z * s * 3**0.5, rel=1e-5)
        by_hand = np.quantile(returns[name], [0.1, 0.5, 0.9])
        assert data.val[n]["constant"][2].numpy() == pytest.approx(by_hand, rel=1e-5)


def test_the_scaled_baseline_is_strong(indices: Indices) -> None:
    """Its held-out pinball loss is 4 to 10% below that of constant quantiles."""
    batch = everything(indices.val)
    levels = torch.tensor(indices.quantiles)

    def loss(quantiles: torch.Tensor) -> float:
        error = batch["y"][..., None] - quantiles
        return torch.where(error > 0, levels * error, (levels - 1) * error).mean().item()

    assert 0.90 < loss(batch["base"]) / loss(batch["constant"]) < 0.96
    inside = (batch["y"] > batch["base"][..., 0]) & (batch["y"] < batch["base"][..., -1])
    assert inside.float().mean() == pytest.approx(0.9, abs=0.04)
    assert (batch["base"].diff(dim=-1) > 0).all(), "quantiles cross"


def test_inputs_are_normalised(indices: Indices) -> None:
    x = everything(indices.train)["x"]
    assert x.shape[1:] == (128, prices_data.CHANNELS)
    assert x.mean((0, 1)).abs().max() < 1
    assert 0.4 < x.std((0, 1)).min() < x.std((0, 1)).max() < 1.6


def test_a_batch_equals_its_samples(indices: Indices) -> None:
    """They are equal bit for bit, so that losses do not depend on the number of workers."""
    chosen = [5000, 0, 7747, 17, 3]
    batch = indices.train.__getitems__(chosen)
    for n, index in enumerate(chosen):
        single = indices.train[index]
        assert all(torch.equal(batch[key][n], single[key]) for key in batch)
    assert torch.equal(indices.train[-1]["x"], indices.train[7747]["x"])


def test_constant_prices_give_finite_values(tmp_path: Path) -> None:
    data = table(tmp_path, {"close": np.concatenate([walk(300), np.full(400, 7.0)])})
    for part in (data.train, data.val):
        assert all(value.isfinite().all() for value in everything(part).values())


def test_parquet_gives_the_same_windows(tmp_path: Path) -> None:
    data = table(tmp_path, {"close": walk(700)})
    pandas.read_csv(tmp_path / "prices.csv", parse_dates=["date"]).to_parquet(tmp_path / "prices.parquet")
    other = Table(
        str(tmp_path / "prices.parquet"), "2001-05-01", ["close"], context=8, horizons=5, quantiles=[0.1, 0.5, 0.9]
    )
    a, b = everything(data.val), everything(other.val)
    assert a["x"].allclose(b["x"], atol=1e-6)
    assert torch.equal(a["time"], b["time"])


def test_inputs_are_the_newest_windows_of_a_file(tmp_path: Path) -> None:
    prices = {"a": walk(400), "b": walk(400, seed=1)}
    data = table(tmp_path, {name: walk(700, seed=2) for name in prices})
    frame = pandas.DataFrame({"date": pandas.date_range("2019-01-01", periods=400), **prices})
    frame.to_csv(tmp_path / "new.csv", index=False, float_format="%.17g")
    inputs = data.inputs(str(tmp_path / "new.csv"))
    assert inputs.names == [f"{tmp_path / 'new.csv'}:a", f"{tmp_path / 'new.csv'}:b"]
    batch = everything(inputs)
    assert "y" not in batch
    assert batch["close"].tolist() == [prices["a"][-1], prices["b"][-1]]
    r = np.concatenate([[0], np.diff(np.log(prices["b"]))])
    expected = data.scaled * ewma_volatility(r, 0.94)[-1] * np.sqrt(np.arange(1, 6))[:, None]
    assert batch["base"][1].numpy() == pytest.approx(expected, rel=1e-5)
    frame[:200].to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(ValueError, match=r"short\.csv: 200 .* 264: data.context=8 .* 256 "):
        data.inputs(str(tmp_path / "short.csv"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "2000-09-01"}, r"prices\.csv: 244 .*\(data.split .* 2000-09-01\b.* 269 .*context=8"),
        ({"split": "2001-11-29"}, r"prices\.csv: 2 .* 2000-01-01 .* 2001-11-30\b.* 5 .*data.horizons"),
        ({"end": "2001-05-03"}, r"prices\.csv: 2 .*data.horizons"),
        ({"split": "soon"}, "data.split=soon"),
        ({"end": "later"}, "data.end=later"),
        ({"quantiles": [0.5, 0.1]}, r"data.quantiles=\[0.5, 0.1\]"),
        ({"quantiles": [0.0, 0.1]}, r"data.quantiles=\[0.0, 0.1\]"),
        ({"quantiles": []}, "data.quantiles="),
        ({"horizons": 0}, "horizons=0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"values": []}, "data.values"),
    ],
)
def test_a_bad_option_is_reported_with_its_value(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(tmp_path, {"close": walk(700)}, **options)


def test_arch_is_not_imported() -> None:
    code = (
        "import sys; from models.prices_data import Indices; Indices(); print({'arch', 'statsmodels'} & {*sys.modules})"
    )
    root = Path(prices_data.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.strip() == "set()"
