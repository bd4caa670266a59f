"""The table of a sweep with many trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import SweepConfig
from launcher.sweeps import records
from launcher.sweeps.space import ChoiceAxis, SearchSpace
from launcher.sweeps.study import Objective, Study, SweepRecord

RATES = ChoiceAxis("lr", (0.1, 0.2, 0.3), ("0.1", "0.2", "0.3"))
SEEDS = ChoiceAxis("seed", (0, 1), ("0", "1"))


@pytest.mark.parametrize("over", [(), ("seed",)])
def test_rows_of_ended_trials_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: tuple[str, ...]
) -> None:
    """Would be wrong: an overhead of each trial that grows with their number, or a table that is out of date."""
    space = SearchSpace((), (RATES, SEEDS), over=over)
    study = Study(tmp_path, space, SweepConfig(), [Objective("val/loss", "min")], 6, None, SweepRecord((), None))
    table, computed = records.Table(study), []
    for _ in range(6):
        number = study.ask()
        assert number is not None
        assert table.rows(frozenset({number}))[number]["state"] == "stopped"
        assert table.rows(waiting=number)[number]["state"] == "waiting"
        assert table.rows()[number]["state"] == "running"
        study.finish(number, "completed", [float(number)], {"seconds": 1.5})
        assert table.rows() == records.rows(study)
    original = records._row

    def row(study: Study, trial: object) -> dict[str, object]:
        computed.append(trial)
        return original(study, trial)  # type: ignore[arg-type]

    monkeypatch.setattr(records, "_row", row)
    assert [found["objective"] for found in table.rows()] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert computed == []
