"""Runs a function as a Ray task on each node of the cluster that this process is connected to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.clusters.capacity import Node
from launcher.errors import last_line


def on_each_node(
    nodes: Sequence[Node], function: Callable[..., Any], *arguments: Any, seconds: float
) -> list[tuple[Any, str]]:
    """Call `function(*arguments)` on all nodes in parallel, and return one (result, problem) per node.

    The task reserves no CPU and is not retried. If it fails, the result is None and the problem is the last line of
    its exception; otherwise the problem is empty.

    Args:
        function: a function that is defined in a function, so that it is pickled by value: launch may not be installed
            on the node.
        seconds: the time limit for all nodes together.
    """
    started = [
        ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))(
            function
        ).remote(*arguments)
        for node in nodes
    ]
    done = set(ray.wait(started, num_returns=len(started), timeout=seconds)[0])
    answers: list[tuple[Any, str]] = []
    for reference in started:
        try:
            if reference in done:
                answers.append((ray.get(reference), ""))
            else:
                answers.append((None, f"no answer within {seconds:g} s"))
        except Exception as error:
            answers.append((None, last_line(error)))
    return answers
