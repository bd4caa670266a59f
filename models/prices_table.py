"""Reads prices by date from CSV and Parquet files, and reports errors by file and row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.file_limits import MAX_BYTES, check_regular, check_size, unpacked


@dataclass(frozen=True)
class Series:
    """Prices (N,) float64 above zero, times (N,) int64 in seconds since 1970 (UTC), increasing; source for messages."""

    name: str
    source: str
    times: np.ndarray
    prices: np.ndarray

    def __len__(self) -> int:
        return len(self.prices)


def read_table(path: str, date: str, values: Sequence[str], date_format: str | None = None) -> list[Series]:
    """Read one series for each column of `values`.

    path: a `.parquet` file, or else CSV, also gzipped. Dates are read as ISO 8601 (2018-12-31, or with a time) unless
    `date_format` is set; a Parquet column of dates is used unchanged.

    Raises:
        OSError: the file does not exist, or the package that reads it is not installed.
        ValueError: a column is missing; a date cannot be read, is duplicate or is earlier than the previous one; a
        price is missing, not a number, or not above zero. Names the file and the row: the line of a CSV file (its
        header is
            line 1), the number from 1 on of a Parquet file.
    """
    if not values:
        raise ValueError("data.values=[]: name at least one column of prices.")
    file = Path(path).expanduser()
    if not file.is_file():
        found = "is a directory" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {found} ({file.absolute()}); it should be a CSV or Parquet file of prices.")
    parquet = file.suffix.lower() in (".parquet", ".pq")
    frame = _frame(file, parquet)
    missing = [name for name in (date, *values) if name not in frame.columns]
    if missing:
        raise ValueError(
            f"{path} has no column {' and no '.join(map(repr, missing))}; it has {', '.join(map(str, frame.columns))}. "
            "Name its columns with data.date and data.values."
        )
    if not len(frame):
        raise ValueError(f"{path} has 0 rows.")
    row = _Rows(path, 1 if parquet else 2)
    times = _times(frame[date], date, date_format, row)
    return [Series(name, path, times, _prices(frame[name], name, row)) for name in values]


@dataclass(frozen=True)
class _Rows:
    path: str
    first: int  # the number of the first row, counted from 1

    def wrong(self, index: int, what: str) -> ValueError:
        return ValueError(f"{self.path}, row {index + self.first}: {what}")


def _frame(file: Path, parquet: bool) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise FileNotFoundError(
            f"{file} is read with pandas, which is missing: pip install 'launch-train[examples]'."
        ) from error
    try:
        if parquet:
            _check_parquet(file)
            return pandas.read_parquet(file)
        content, whole = unpacked(file)
        if not whole:
            raise EOFError("the compressed file ends before its end-of-stream marker")
        # As text, so that an invalid price is printed unchanged. Empty lines count as rows, so that row numbers agree.
        frame = pandas.read_csv(
            io.BytesIO(content),
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            skipinitialspace=True,
            encoding="utf-8-sig",
        )
    except MemoryError:
        raise
    except Exception as error:  # pandas and pyarrow raise exceptions of any type
        kind = "Parquet" if parquet else "CSV"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} cannot be read as a {kind} file: {reason}") from error
    empty = (frame == "").all(axis=1).to_numpy()
    end = len(frame)
    while end and empty[end - 1]:
        end -= 1
    return frame[:end]


def _check_parquet(file: Path) -> None:
    import pyarrow.parquet as pq

    found = pq.read_metadata(check_regular(file))
    groups = [found.row_group(i).total_byte_size for i in range(found.num_row_groups)]
    check_size(f"{file}", max(sum(groups), 8 * found.num_rows * found.num_columns), MAX_BYTES, "bytes", None)


def _times(column: Any, name: str, date_format: str | None, row: _Rows) -> np.ndarray:
    """Return seconds since 1970, which must increase. Time zones are converted to UTC."""
    import pandas

    if pandas.api.types.is_datetime64_any_dtype(column):
        parsed = pandas.to_datetime(column, utc=True, errors="coerce")
    else:
        texts = column.astype(str).str.strip()
        parsed = pandas.to_datetime(texts, utc=True, errors="coerce", format=date_format or "ISO8601")
        if date_format is None:  # ISO 8601 allows 20181231 and 2018 as well, which are more likely numbers than dates
            parsed = parsed.where(texts.str.match(r"\d{4}-\d{2}-\d{2}"))
    bad = parsed.isna().to_numpy()
    if bad.any():
        i = int(bad.argmax())
        expected = f"the form {date_format} (data.date_format)" if date_format else "a date such as 2018-12-31"
        help = "" if date_format else "; for another form set data.date_format, for example %m/%d/%Y"
        raise row.wrong(i, f"{name} is {_shown(column.iloc[i])}, expected {expected}{help}.")
    times = parsed.dt.tz_localize(None).to_numpy().astype("datetime64[s]").astype(np.int64)
    steps = np.diff(times)
    if (steps <= 0).any():
        i = int((steps <= 0).argmax()) + 1
        dates = [str(np.datetime64(int(t), "s")).removesuffix("T00:00:00") for t in times[i - 1 : i + 1]]
        if steps[i - 1] == 0:
            raise row.wrong(i, f"{name} is {dates[1]}, as in the previous row; expected one row per date.")
        raise row.wrong(
            i, f"{name} is {dates[1]}, before {dates[0]} of the previous row; expected increasing dates: sort the file."
        )
    return np.asarray(times)


def _prices(column: Any, name: str, row: _Rows) -> np.ndarray:
    import pandas

    prices = np.asarray(pandas.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan))
    bad = ~(np.isfinite(prices) & (prices > 0))
    if bad.any():
        i = int(bad.argmax())
        raise row.wrong(i, f"{name} is {_shown(column.iloc[i])}, expected a price: a number above zero.")
    return prices


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if value.strip() else "empty"
    return str(value)
