"""Fixtures for the tests of cluster=azure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.clusters.pricing import catalogue
from tests.azure.fake import Fake

A100 = "Standard_NC24ads_A100_v4"


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A fake of Azure with capacity for every size, for this process and its children."""
    with Fake(tmp_path / "azure") as fake:
        fake.sizes = {name: list("12") for name in (*catalogue.sizes(), *catalogue.heads())}
        families = {vm.quota_family for vm in (*catalogue.sizes().values(), *catalogue.heads().values())}
        fake.usages = dict.fromkeys((*families, "cores", "lowPriorityCores"), (1000, 0))
        for name, value in fake.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        yield fake
