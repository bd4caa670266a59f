"""How many workers the next group gets."""

from __future__ import annotations

import pytest

from launcher.runners.controller_policy import freed_less


@pytest.mark.parametrize(
    ("found", "held", "less"),
    [
        ({"a": 1}, [], False),
        ({"a": 1}, ["a"], False),
        ({"a": 0}, ["a"], True),
        ({"a": 0, "new": 1}, ["a"], True),  # as much room as was held, and on another node: a group too small
        ({"a": 1, "new": 1}, ["a"], False),
        ({"a": 1}, ["a", "a"], True),
        ({"b": 1}, ["a", "b"], False),  # a is gone
    ],
)
def test_what_a_group_held_is_waited_for_node_by_node(found: dict[str, int], held: list[str], less: bool) -> None:
    assert freed_less(found, held) is less
