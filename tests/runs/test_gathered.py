"""The file system of run.root=head:///PATH, which must behave like an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError, StorageError
from launcher.runs import gathered
from launcher.runs.storage import Store, check_uri


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(check_uri(f"head://{tmp_path}/runs/a"), patience=2)


def test_files_are_whole_or_absent(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "BLOCK_BYTES", 1000)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 40)
    store.put("checkpoints/step-1/data", source)
    store.put_bytes("empty", b"")
    assert {name: entry.size for name, entry in store.entries().items()} == {
        "checkpoints/step-1/data": 10240,
        "empty": 0,
    }
    assert store.entries()["empty"].mtime == pytest.approx(source.stat().st_mtime, abs=60)
    store.get("checkpoints/step-1/data", tmp_path / "back", 10240)
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert list(store.entries(recursive=False)) == ["empty"]

    stream = store.filesystem.open_output_stream(f"{store.path}/half")
    stream.write(b"half")
    del stream
    assert "half" not in store.entries()
    store.remove("checkpoints/step-1")
    store.remove("checkpoints/step-1")
    assert list(store.entries()) == ["empty"]
    assert store.under("nothing").entries() == {}
    with pytest.raises(FileNotFoundError):
        store.read("nothing")


def test_failures_of_the_head_are_retried_and_then_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = 2

    def call(name: str, *arguments: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("the head of the cluster did not answer: actor died")
        return gathered._call_here(name, *arguments)

    monkeypatch.setattr(gathered, "_call", call)
    store.put_bytes("facts", b"1")
    assert store.read("facts") == b"1"
    failures = 1000
    with pytest.raises(StorageError, match="did not answer"):
        store.put_bytes("facts", b"2")


@pytest.mark.parametrize("uri", ["head://vm1/runs", "head:///", "head:////a", "head:///a?key=1"])
def test_the_uri_must_be_a_path_on_the_head(uri: str) -> None:
    with pytest.raises(ConfigError, match="head:///PATH"):
        check_uri(uri)
