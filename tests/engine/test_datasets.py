"""What a job's data must have, and what is said of data that have it not."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.engine.datasets import Data
from launcher.errors import DataError


class Given:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "has no attribute `train`"),
        ({"train": iter([1, 2])}, "a list_iterator; a map-style data set"),
        ({"train": []}, r"Given.train is empty"),
        ({"train": [1], "val": []}, r"Given.val is empty"),
        ({"train": [1], "val": {"good": [1], "none": []}}, r"Given.none is empty"),
        ({"train": [1], "test": 5}, "a int; a map-style data set"),
    ],
)
def test_what_a_data_object_lacks_is_told(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Data.of(Given(**parts))


def test_parts_of_a_data_object_may_be_left_out() -> None:
    data = Data.of(Given(train=[1, 2]))
    assert (data.val, data.test, data.collate, data.num_workers) == ({}, {}, None, 0)
    data = Data.of(Given(train=[1], val=[2], test={"a": [3]}, num_workers=None))
    assert (data.val, data.test, data.num_workers) == ({"": [2]}, {"a": [3]}, 0)


@pytest.mark.parametrize("blocks", [[1, 1], [4, -1], [1.5, 1.5]])
def test_blocks_that_are_none_are_refused(blocks: Any) -> None:
    class Three(list[int]):
        pass

    dataset = Three([1, 2, 3])
    dataset.blocks = blocks  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"not the sizes of its parts"):
        Data.of(Given(train=dataset))


@pytest.mark.parametrize("lengths", [[1, 2], [1.5, 2.0, 3.0], [[1], [2], [3]], ["a", "b", "c"], [[1], [2, 3], [4]], 7])
def test_lengths_that_are_none_are_refused(lengths: Any) -> None:
    class Three(list[int]):
        pass

    dataset = Three([1, 2, 3])
    dataset.lengths = lengths  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"one whole number for each of its 3 samples"):
        Data.of(Given(train=dataset))
