"""The validation of the data of a job."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.engine.datasets import Data
from launcher.errors import DataError


class Source:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, r"Source .*`train`"),
        ({"train": iter([1, 2])}, r"Source\.train .* list_iterator; .*__getitem__"),
        ({"train": []}, r"Source\.train .* 0 "),
        ({"train": [1], "val": []}, r"Source\.val .* 0 "),
        ({"train": [1], "val": {"good": [1], "none": []}}, r"Source\.none .* 0 "),
        ({"train": [1], "test": 5}, r"Source\.test .* int; .*__getitem__"),
    ],
)
def test_missing_or_unusable_parts_are_reported(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Data.of(Source(**parts))


def test_optional_parts_may_be_missing() -> None:
    data = Data.of(Source(train=[1, 2]))
    assert (data.val, data.test, data.collate, data.num_workers) == ({}, {}, None, 0)
    data = Data.of(Source(train=[1], val=[2], test={"a": [3]}, num_workers=None))
    assert (data.val, data.test, data.num_workers) == ({"": [2]}, {"a": [3]}, 0)


@pytest.mark.parametrize("blocks", [[1, 1], [4, -1], [1.5, 1.5]])
def test_invalid_blocks_are_rejected(blocks: Any) -> None:
    class Three(list[int]):
        pass

    dataset = Three([1, 2, 3])
    dataset.blocks = blocks  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"`blocks` .*Source\.train .* 3\b"):
        Data.of(Source(train=dataset))


@pytest.mark.parametrize("lengths", [[1, 2], [1.5, 2.0, 3.0], [[1], [2], [3]], ["a", "b", "c"], [[1], [2, 3], [4]], 7])
def test_invalid_lengths_are_rejected(lengths: Any) -> None:
    class Three(list[int]):
        pass

    dataset = Three([1, 2, 3])
    dataset.lengths = lengths  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"`lengths` .*Source\.train .* 3 "):
        Data.of(Source(train=dataset))
