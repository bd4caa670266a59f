"""The policy of Ray Train's controller: the size of the next group."""

from __future__ import annotations

import pytest

from launcher.runners.controller_policy import holds_less


@pytest.mark.parametrize(
    ("found", "held", "less"),
    [
        ({"a": 1}, [], False),
        ({"a": 1}, ["a"], False),
        ({"a": 0}, ["a"], True),
        ({"a": 0, "new": 1}, ["a"], True),  # the same capacity on another node: the group would be too small
        ({"a": 1, "new": 1}, ["a"], False),
        ({"a": 1}, ["a", "a"], True),
        ({"b": 1}, ["a", "b"], False),  # a was lost
    ],
)
def test_released_resources_are_compared_by_node(found: dict[str, int], held: list[str], less: bool) -> None:
    assert holds_less(found, held) is less
