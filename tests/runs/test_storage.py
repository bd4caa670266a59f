"""URIs of run roots, and retries of operations on a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError, StorageError
from launcher.jobs.prepare import root_of
from launcher.runs import storage
from launcher.runs.storage import Store, check_uri, is_tame, is_uri

REFUSED = {
    "ftp://host/runs": "ftp://, .* abfss://, s3://, gs://, head://, file://",
    "abfss://container@account.dfs.core.windows.net/runs?sig=geheim": r"config\.yaml; .*docs/storage\.md",
    "abfss://container:geheim@account.dfs.core.windows.net/runs": r"config\.yaml; .*docs/storage\.md",
    "s3://AKIA:geheim@bucket/runs": r"config\.yaml; .*docs/storage\.md",
    "s3://geheim@bucket/runs": r"config\.yaml; .*docs/storage\.md",
    "abfss://account.dfs.core.windows.net/runs": "abfss://CONTAINER@ACCOUNT",
    "abfss://container@account/runs": "abfss://CONTAINER@ACCOUNT",
    "gs:///runs": "SCHEME://BUCKET/PATH",
    "s3://bucket/a/../b": "SCHEME://BUCKET/PATH",
}


@pytest.mark.parametrize("uri", REFUSED)
def test_an_invalid_uri_is_reported_without_its_secret(uri: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[uri]) as caught:
        check_uri(uri)
    assert "geheim" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_the_uri_of_a_directory_is_a_directory(tmp_path: Path) -> None:
    assert root_of(f"file://{tmp_path}/my%20runs") == tmp_path / "my runs"
    assert not is_uri("file:///runs")
    with pytest.raises(ConfigError, match=r"run.root=file://host/runs: .* file:///"):
        root_of("file://host/runs")


@pytest.mark.parametrize(
    ("name", "tame"),
    [
        ("run/result.json", True),
        ("run/..config", True),
        ("../result.json", False),
        ("run/../../x", False),
        ("/etc/passwd", False),
        ("run//x", False),
        ("run/a\\b", False),
        ("run/.", False),
    ],
)
def test_names_outside_of_the_target_directory_are_rejected(name: str, tame: bool) -> None:
    assert is_tame(name) is tame


class Flaky:
    """A fake of pyarrow's file system that fails a number of times, then deletes."""

    def __init__(self, failures: int, error: OSError) -> None:
        self.left, self.error, self.calls = failures, error, 0

    def delete_dir(self, path: str) -> None:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error


def store_over(flaky: Any, patience: float = 60) -> Store:
    return Store(flaky, "container/runs", "abfss://container@account.dfs.core.windows.net/runs", patience)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the delays between retries; no time passes."""
    taken: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", taken.append)
    monkeypatch.setattr(storage.time, "monotonic", lambda: sum(taken))
    return taken


def test_failures_are_retried_with_growing_random_delays(naps: list[float]) -> None:
    flaky = Flaky(5, OSError("Azure Error: [ServerBusy] 503 The server is busy."))
    store_over(flaky).remove("old")
    assert flaky.calls == 6
    assert all(0.25 * 2**n <= nap <= 0.5 * 2**n for n, nap in enumerate(naps))
    assert len({nap / 2**n for n, nap in enumerate(naps)}) == 5


def test_retries_end_after_the_patience(naps: list[float]) -> None:
    flaky = Flaky(10**6, OSError("Could not connect to server"))
    with pytest.raises(StorageError, match=r"/runs: old .* \d+ .*\): Could not connect") as caught:
        store_over(flaky).remove("old")
    assert 30 < sum(naps) <= 60
    assert caught.value.exit_status == 1


def test_permanent_errors_are_reported_immediately_and_without_a_key(
    naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "geheim")
    error = OSError(
        "https://a/b?sv=1&sig=signature failed with geheim. Azure Error: [AuthorizationFailure] 403 Refused."
    )
    with pytest.raises(StorageError, match="403") as caught:
        store_over(Flaky(9, error)).remove("old")
    assert not naps
    assert "geheim" not in str(caught.value)
    assert "signature" not in str(caught.value)
