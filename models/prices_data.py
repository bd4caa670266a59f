"""Prices by date: two American stock indices of a package, or any CSV or Parquet file.

Each class is a whole data section. A sample is a window: the features known at the close of one row (the origin), and
the log-returns from there to the closes of the next `horizons` rows. Rows are trading days if the file has one row per
trading day. The split is by date and leaks nothing: targets of training end before `split`, targets of validation start
at `split` or later, and everything that is fitted (the quantiles of the two baselines) is fitted to training rows. The
scale of a window is computed from the rows up to its origin.

Every window includes two baselines, so that a model is evaluated on the same values: `constant`, the quantiles of the
training returns, and `base`, the same for returns divided by an exponentially weighted volatility (RiskMetrics
Technical Document, J.P. Morgan/Reuters 1996, section 5.2), times the volatility at the origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.prices_table import Series, read_table
from models.vision_data import packaged

SPANS = (5, 22, 66, 256)  # rows over which volatility is measured: a week, a month, a quarter, a year
LOOKBACK = max(SPANS)
DRIFTS = (0.8, 0.94, 0.97)  # decays of the weighted means of returns
CHANNELS = 2 + len(SPANS) + 1 + len(DRIFTS)  # of a window; see `Windows`
WARM_UP = 22  # number of returns that initialize the exponentially weighted variance
FLOOR = 1e-5  # minimum volatility of a row: avoids division by zero for constant prices
CLIP = 6.0  # features clip a return at this many volatilities; targets are not clipped

# Columns of `Rows`; then follow the logarithms of volatilities over SPANS and over all rows, then drifts.
RETURN, VOLATILITY, LOG_VOLATILITY, SPANNED = 0, 1, 2, 3
DRIFT = SPANNED + len(SPANS) + 1
Origin = tuple[int, int]  # number of the series, and the row from which a window forecasts


class Windows:
    """A data set in memory of windows, returned as whole batches: a mapping of

    - `x` (B, context, CHANNELS) float32: by row, oldest first, the features at its close, relative to the volatility s
    at the origin: the return / s and its absolute value; the logarithm of the volatility over the last 5, 22, 66 and
      256 rows and over all rows so far, / s; three exponentially weighted means of returns / s (losses are followed by
      more volatility than gains: the leverage effect).
    - `base` (B, H, Q) float32: quantiles of the log-return from the origin to 1..H rows later, by the scaled baseline.
    - `past` (B, context) float32: logarithm of each row's price relative to the one at the origin.
    - `close` (B,) float64 and `time` (B,) int64: price at the origin, and its date in seconds since 1970 (UTC).
    - with targets: `y` (B, H) float32, the log-returns, and `constant` (B, H, Q) float32, the other baseline.
    """

    def __init__(
        self,
        series: Sequence[Rows],
        origins: Sequence[Origin],
        context: int,
        scaled: np.ndarray,
        constant: np.ndarray | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """scaled (H, Q): quantiles of scaled returns. constant (S, H, Q)."""
        lengths = np.cumsum([0] + [len(one.series) for one in series])
        self.context = context
        self.series = torch.tensor([number for number, _ in origins])
        self.rows = torch.tensor([int(lengths[number]) + row for number, row in origins])  # in the joined columns
        self.columns = torch.from_numpy(np.concatenate([one.columns for one in series]))  # (N, CHANNELS + 1)
        self.prices = torch.from_numpy(np.concatenate([one.series.prices for one in series]))  # (N,)
        self.logs = torch.from_numpy(np.concatenate([one.logs for one in series]))  # (N,)
        self.times = torch.from_numpy(np.concatenate([one.series.times for one in series]))  # (N,)
        self.scaled = torch.from_numpy(scaled)
        self.constant = None if constant is None else torch.from_numpy(constant).float()
        if names is not None:
            self.names = list(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        i = torch.as_tensor(indices)
        rows = self.rows[i]  # (B,)
        horizons = len(self.scaled)
        history = rows[:, None] + torch.arange(1 - self.context, 1)  # (B, context)
        columns = self.columns[history]  # (B, context, CHANNELS + 1), float64
        volatility = self.columns[rows, VOLATILITY]  # (B,)
        log = self.logs[rows][:, None]  # (B, 1)
        batch = {
            "x": _relative(columns).float(),
            "base": (self.scaled * volatility[:, None, None] * _root(horizons)[:, None]).float(),
            "past": (self.logs[history] - log).float(),
            "close": self.prices[rows],
            "time": self.times[rows],
        }
        if self.constant is not None:
            ahead = rows[:, None] + torch.arange(1, horizons + 1)  # (B, H)
            batch["y"] = (self.logs[ahead] - log).float()
            batch["constant"] = self.constant[self.series[i]]
        return batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([range(len(self))[index]]).items()}


class Rows:
    """A series with the precomputed features of each row: columns (N, CHANNELS + 1) of the rows up to it."""

    def __init__(self, series: Series, decay: float) -> None:
        self.series = series
        self.logs = np.log(series.prices)
        returns = np.diff(self.logs, prepend=self.logs[0])  # the first is 0, and excluded below where it matters
        squares = returns**2
        volatility = ewma_volatility(returns, decay)
        variances = [_trailing_mean(squares, span) for span in SPANS]
        variances.append(np.cumsum(squares) / np.maximum(np.arange(len(squares)), 1))
        columns = [returns, volatility, np.log(volatility)]
        columns += [np.log(np.maximum(np.sqrt(variance), FLOOR)) for variance in variances]
        columns += [_weighted_mean(returns, drift) for drift in DRIFTS]
        self.columns = np.stack(columns, 1)

    def targets(self, origins: np.ndarray, horizons: int) -> np.ndarray:
        """Return log-returns from each origin to 1..horizons rows later, (n, H)."""
        return self.logs[origins[:, None] + np.arange(1, horizons + 1)] - self.logs[origins][:, None]


class Prices:
    """Base class of both sections below: the split, the baselines and the windows of some series."""

    num_workers = 0

    def __init__(
        self,
        series: Sequence[Series],
        columns: tuple[str, Sequence[str], str | None],
        split: str,
        end: str | None,
        context: int,
        horizons: int,
        quantiles: Sequence[float],
        decay: float,
    ) -> None:
        """`columns` of a file to forecast from: dates, prices, and the format of dates."""
        self.columns, self.context, self.horizons, self.decay = columns, context, horizons, decay
        self.quantiles = [float(q) for q in quantiles]
        self._check_options()
        first, last = _seconds(split, "split"), None if end is None else _seconds(end, "end")
        rows = [Rows(one, decay) for one in series]
        train: list[Origin] = []
        val: list[Origin] = []
        for number, one in enumerate(series):
            learn, hold = self._origins(one, first, last)
            train += [(number, row) for row in learn.tolist()]
            val += [(number, row) for row in hold.tolist()]
        self.scaled, constant = self._baselines(rows, train)
        self.train = Windows(rows, train, context, self.scaled, constant)
        self.val = Windows(rows, val, context, self.scaled, constant)

    def _check_options(self) -> None:
        q = self.quantiles
        if not q or any(not 0 < one < 1 for one in q) or any(a >= b for a, b in pairwise(q)):
            raise ValueError(f"data.quantiles={q}: must increase and be between 0 and 1.")
        if self.context < 1 or self.horizons < 1 or not 0 < self.decay < 1:
            raise ValueError(
                f"data.context={self.context}, horizons={self.horizons}, decay={self.decay}: context and horizons are "
                "at least 1, decay is between 0 and 1."
            )

    def _origins(self, series: Series, split: int, end: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the origins of training and validation windows.

        A training window's last target is before the split, a validation window's first target at or after it. Its
        history may start before the split, because that is the past at its origin.
        """
        times, h = series.times, self.horizons
        used = len(times) if end is None else int(np.searchsorted(times, end))
        cut = int(np.searchsorted(times, split))
        train = np.arange(self._first(), cut - h)
        val = np.arange(max(self._first(), cut - 1), used - h)
        for found, what, has in ((train, "training", cut), (val, "validation", used - cut)):
            if not len(found):
                need = self._first() + h + 1 if what == "training" else h
                raise ValueError(
                    f"{series.source}: {has} rows for {what} (data.split is {_iso(split)}, the file goes from "
                    f"{_iso(times[0])} to {_iso(times[-1])}), and at least {need} are needed: "
                    + (
                        f"data.context={self.context} and {LOOKBACK} before it, and data.horizons={h}."
                        if what == "training"
                        else f"data.horizons={h}."
                    )
                )
        return train, val

    def _first(self) -> int:
        """Return the first row with enough history: `context` rows, and before them the longest span."""
        return LOOKBACK + self.context - 1

    def _baselines(self, rows: Sequence[Rows], train: Sequence[Origin]) -> tuple[np.ndarray, np.ndarray]:
        """Return the quantiles by horizon of scaled training returns, all series together (H, Q), and of returns (S, H,
        Q).

        They need no history, unlike a model, and so are fitted to the first years too, which makes the scaled baseline
        stronger. Scaled returns of different series are similar, and together make a stronger baseline; returns are
        not.
        """
        numbers, origins = np.array(train).T
        scaled, constant = [], []
        for number, one in enumerate(rows):
            mine = np.arange(WARM_UP, origins[numbers == number].max() + 1)
            y = one.targets(mine, self.horizons)  # (n, H)
            scaled.append(y / (one.columns[mine, VOLATILITY, None] * np.sqrt(np.arange(1, self.horizons + 1))))
            constant.append(np.quantile(y, self.quantiles, axis=0).T)
        return np.quantile(np.concatenate(scaled), self.quantiles, axis=0).T, np.stack(constant)

    def inputs(self, path: str) -> Windows:
        """Return the newest window of each series in a file of the same columns, to forecast from its last date."""
        series = read_table(path, *self.columns)
        need = self._first() + 1
        for one in series:
            if len(one) < need:
                raise ValueError(
                    f"{one.source}: {len(one)} rows, and a forecast needs at least {need}: data.context="
                    f"{self.context} and {LOOKBACK} before it."
                )
        rows = [Rows(one, self.decay) for one in series]
        names = [path] if len(series) == 1 else [f"{path}:{one.name}" for one in series]
        origins = [(number, len(one) - 1) for number, one in enumerate(series)]
        return Windows(rows, origins, self.context, self.scaled, names=names)


class Table(Prices):
    """Prices of one or several series in a CSV (also .gz) or Parquet file, one row per date, one column per series.

    Args:
        path: the file.
        date: its column of dates, ISO 8601 unless `date_format` is set (`%m/%d/%Y`).
        values: its columns of prices, each a separate series; all above zero.
        split: the first date of validation. end: the first date that is excluded, so that settings can be selected on
        earlier years: split=2013-01-01 end=2016-01-01.
        context: input rows of a model. horizons: number of forecast rows, from 1 on. quantiles: levels of the forecast,
        increasing.
        decay: of the exponentially weighted variance; 0.94 is RiskMetrics' for daily prices.

    Raises:
        OSError, ValueError: naming file and row, see `models.prices_table`.
    """

    def __init__(
        self,
        path: str,
        split: str,
        values: Sequence[str],
        date: str = "date",
        date_format: str | None = None,
        end: str | None = None,
        context: int = 128,
        horizons: int = 20,
        quantiles: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95),
        decay: float = 0.94,
    ) -> None:
        columns = date, list(values), date_format
        super().__init__(read_table(path, *columns), columns, split, end, context, horizons, quantiles, decay)


class Indices(Prices):
    """Daily closes of the S&P 500 and the Nasdaq Composite, 1999 to 2018, from package arch; 2016 to 2018 held out.

    The package is not imported: its files are read. For `inputs`, a file has the columns Date and Close.
    """

    def __init__(
        self,
        split: str = "2016-01-01",
        end: str | None = None,
        context: int = 128,
        horizons: int = 20,
        quantiles: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95),
        decay: float = 0.94,
    ) -> None:
        columns: tuple[str, list[str], str] = "Date", ["Close"], "%m/%d/%Y"
        paths = [packaged("arch", f"data/{name}/{name}.csv.gz") for name in ("sp500", "nasdaq")]
        series = [one for path in paths for one in read_table(str(path), *columns)]
        super().__init__(series, ("Date", ["Close"], None), split, end, context, horizons, quantiles, decay)


def ewma_volatility(returns: np.ndarray, decay: float) -> np.ndarray:
    """s_t of s_t² = decay s_{t-1}² + (1 - decay) r_t², that is from returns up to t. returns (N,) -> (N,).

    It starts with the mean square of the first WARM_UP returns, which precede any window's origin. returns[0] is
    excluded, because the first row has no return.
    """
    first = float((returns[1 : WARM_UP + 1] ** 2).mean()) if len(returns) > 1 else 0.0
    return np.maximum(np.sqrt(_weighted_mean(returns**2, decay, first)), FLOOR)


def _weighted_mean(values: np.ndarray, decay: float, first: float = 0.0) -> np.ndarray:
    """m_0 = first, m_t = decay m_{t-1} + (1 - decay) v_t. (N,) -> (N,)"""
    means = np.empty(len(values))
    means[0] = first
    for t in range(1, len(values)):
        means[t] = decay * means[t - 1] + (1 - decay) * values[t]
    return means


def _trailing_mean(values: np.ndarray, span: int) -> np.ndarray:
    """Return the mean of each row and the span - 1 rows before it, or fewer at the beginning. (N,) -> (N,)"""
    rows = np.arange(len(values))
    # A difference of running sums would leave rounding errors for constant prices; a view of windows does not.
    padded = np.concatenate([np.zeros(span - 1), values])
    sums = np.lib.stride_tricks.sliding_window_view(padded, span).sum(1)
    return np.asarray(sums / np.minimum(rows + 1, span))


def _relative(columns: Tensor) -> Tensor:
    """Return the features of columns (B, T, CHANNELS + 1), in units of the volatility of the last row."""
    s = columns[:, -1:, VOLATILITY, None]  # (B, 1, 1)
    z = columns[..., :1] / s
    levels = (columns[..., SPANNED:DRIFT] - columns[:, -1:, LOG_VOLATILITY, None]).clamp(-3, 3) * 2
    drifts = (columns[..., DRIFT:] / s * _drift_scale()).clamp(-CLIP, CLIP)
    # Mean about zero and deviation about one, by constants: nothing here is fitted to data.
    return torch.cat([z.clamp(-CLIP, CLIP), z.abs().clamp(max=CLIP) - 0.8, levels, drifts], 2)


def _drift_scale() -> Tensor:
    """Return 1 / deviation of the weighted means of independent returns with deviation one."""
    return torch.tensor([((1 + drift) / (1 - drift)) ** 0.5 for drift in DRIFTS], dtype=torch.float64)


def _root(horizons: int) -> Tensor:
    return torch.arange(1, horizons + 1, dtype=torch.float64).sqrt()


def _seconds(text: str, key: str) -> int:
    try:
        return int(np.datetime64(str(text), "s").astype(np.int64))
    except ValueError as error:
        raise ValueError(f"data.{key}={text}: must be a date such as 2016-01-01.") from error


def _iso(seconds: Any) -> str:
    return str(np.datetime64(int(seconds), "s")).removesuffix("T00:00:00")
