"""All faults of the table: the run completes, or fails with a reason and an intact checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import Trial
from tests.faults.table import ROWS, Row, play, undisturbed


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The undisturbed run."""
    return undisturbed(tmp_path_factory.mktemp("reference"), "cluster=none", "model.seconds=0")


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id, marks=[] if row.core else pytest.mark.slow) for row in ROWS]
)
def test_fault(row: Row, reference: Trial, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    machines = request.getfixturevalue("machines") if row.place == "machines" else None
    print("\n| " + " | ".join(play(row, tmp_path, machines, reference).cells()) + " |")
