"""models/prices_table.py: CSV and Parquet files of prices, and errors of bad files."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from models.prices_table import read_table

LINES = ["date,close,open", "2020-01-01,10,1", "2020-01-02,11.5,1", "2020-01-05,1e1,1"]


def write(folder: Path, lines: list[str], name: str = "prices.csv") -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def days(times: np.ndarray) -> list[str]:
    return [str(day) for day in times.astype("datetime64[s]").astype("datetime64[D]")]


def test_csv_is_read_completely(tmp_path: Path) -> None:
    close, first = read_table(write(tmp_path, LINES), "date", ["close", "open"])
    assert close.prices.tolist() == [10, 11.5, 10]
    assert first.prices.tolist() == [1, 1, 1]
    assert days(close.times) == ["2020-01-01", "2020-01-02", "2020-01-05"]
    assert (close.name, first.name) == ("close", "open")


def test_gzip_byte_order_mark_and_empty_lines_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "prices.csv.gz"
    path.write_bytes(gzip.compress(("\ufeff" + "\n".join(LINES) + "\n\n,,\n\n").encode()))
    assert len(read_table(str(path), "date", ["close"])[0]) == 3


@pytest.mark.parametrize("kind", ["timestamp", "date", "text", "zone"])
def test_parquet_equals_csv(tmp_path: Path, kind: str) -> None:
    frame = pandas.read_csv(write(tmp_path, LINES))
    if kind != "text":
        frame["date"] = pandas.to_datetime(frame["date"])
    if kind == "date":
        frame["date"] = frame["date"].dt.date
    if kind == "zone":
        frame["date"] = (frame["date"] - timedelta(hours=1)).dt.tz_localize("UTC").dt.tz_convert("Europe/Berlin")
    frame.to_parquet(tmp_path / "prices.parquet")
    (series,) = read_table(str(tmp_path / "prices.parquet"), "date", ["close"])
    (expected,) = read_table(str(tmp_path / "prices.csv"), "date", ["close"])
    assert series.prices.tolist() == expected.prices.tolist()
    assert (expected.times - series.times).tolist() == [3600 if kind == "zone" else 0] * 3


def test_times_of_day_and_other_forms_of_dates(tmp_path: Path) -> None:
    lines = ["date,close", "2020-01-01 09:30:00,1", "2020-01-01 09:31:00,2"]
    assert np.diff(read_table(write(tmp_path, lines), "date", ["close"])[0].times).tolist() == [60]
    lines = ["date,close", "12/31/2019,1", "1/2/2020,2"]
    (series,) = read_table(write(tmp_path, lines), "date", ["close"], "%m/%d/%Y")
    assert days(series.times) == ["2019-12-31", "2020-01-02"]


def row(index: int, text: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:index], text, *lines[index + 1 :]]


BAD: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "no date column": (row(0, "day,close,open"), "'date'.* day, close, open.*data.date"),
    "no value column": (row(0, "date,Close,open"), "'close'.* date, Close, open.*data.values"),
    "unsorted": (lambda lines: [*lines, "2020-01-03,1,1"], "row 5: date .*2020-01-03.*2020-01-05"),
    "twice": (lambda lines: [*lines, "2020-01-05,1,1"], r"row 5: date .*2020-01-05\D*$"),
    "no date": (row(2, "soon,1,1"), 'row 3: date .*"soon".*2018-12-31.*data.date_format'),
    "American date": (row(1, "1/4/1999,1,1"), 'row 2: date .*"1/4/1999".*%m/%d/%Y'),
    "only a year": (row(1, "1999,1,1"), 'row 2: date .*"1999"'),
    "no such day": (row(2, "2020-02-30,1,1"), 'row 3: date is "2020-02-30"'),
    "empty date": (row(2, ",1,1"), "row 3: date is empty"),
    "empty line": (row(2, ""), "row 3: date is empty"),
    "NaN": (row(3, "2020-01-05,NaN,1"), 'row 4: close .*"NaN"'),
    "empty": (row(3, "2020-01-05,,1"), 'row 4: close [^"]*$'),
    "text": (row(2, '2020-01-02,"1,000",1'), 'row 3: close .*"1,000"'),
    "zero": (row(1, "2020-01-01,0,1"), 'row 2: close .*"0"'),
    "negative": (row(2, "2020-01-02,-37.63,1"), 'row 3: close is "-37.63"'),
    "infinite": (row(2, "2020-01-02,inf,1"), 'row 3: close is "inf"'),
    "no rows": (lambda lines: lines[:1], r" \b0\b"),
    "nothing": (lambda lines: [], "CSV.*: No columns to parse"),
    "too many fields": (row(2, "2020-01-02,1,1,1,1"), "CSV.*line 3, saw 5"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_table_is_reported_with_file_and_row(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]], message: str
) -> None:
    path = write(tmp_path, spoil(LINES))
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_table(path, "date", ["close"])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("close", [1.0, float("nan"), 2.0], r"row 2: close .*\bnan\b"),
        ("close", [1.0, 2.0, -3.0], "row 3: close is -3.0"),
        ("close", ["1", "2", "x"], 'row 3: close is "x"'),
        ("date", [date(2020, 1, 1), None, date(2020, 1, 2)], "row 2: date .*None"),
        ("date", [20200101, 20200102, 20200103], "row 1: date .*20200101"),
    ],
)
def test_a_bad_parquet_file_is_reported_with_file_and_row(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    frame = pandas.DataFrame({"date": pandas.date_range("2020-01-01", periods=3), "close": [1.0, 2.0, 3.0]})
    frame[column] = values
    path = tmp_path / "prices.parquet"
    frame.to_parquet(path)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_table(str(path), "date", ["close"])


def test_a_file_that_is_no_table_is_reported(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.csv "):
        read_table(str(tmp_path / "nothing.csv"), "date", ["close"])
    with pytest.raises(OSError, match=rf"^{tmp_path} .*CSV"):
        read_table(str(tmp_path), "date", ["close"])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"a\.parquet .* Parquet\b"):
        read_table(str(tmp_path / "a.parquet"), "date", ["close"])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"date,close\n" * 9999)[:-9])
    with pytest.raises(ValueError, match=r"a\.csv\.gz .* CSV\b"):
        read_table(str(tmp_path / "a.csv.gz"), "date", ["close"])
