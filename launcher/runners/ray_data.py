"""Training data that are read as a stream are read by Ray Data: in tasks on any node, while the workers train.

Each worker has a data set of its own over its own part, made anew for every pass (so that the seed orders it). The
shards of `ray.train.get_dataset_shard` are not used: one that is split while it flows has every worker wait for all
others at the end of a pass, and their order is given before training.

The tasks reserve no CPU, since all may be the workers': and a task that holds the last free one while its worker waits
for another worker, whose task waits for that CPU, would wait for good. Instead there are only as many at a time as
there are CPUs that nobody has reserved, and one.
"""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray import cloudpickle

_TASKS = 256  # in one pass of one worker at most; each reads several items where there are more


def reader(home: str, python_path: list[str], workers: int) -> Callable[..., Iterator[Any]]:
    """Return what applies a function to items as `map` does, in the same order, in Ray Data's tasks.

    A ValueError or OSError of the function is raised as it was; another error of it as Ray tells it.

    Args:
        home, python_path: where the tasks find this package, and the modules that the function needs.
        workers: how many share what the cluster has.
    """

    def apply(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        rows = [{"item": pickle.dumps(item)} for item in items]
        return _apply(rows, _task(cloudpickle.dumps(function), home, python_path), workers) if rows else iter(())

    return apply


def _apply(rows: list[dict[str, bytes]], task: Callable[..., Any], workers: int) -> Iterator[Any]:
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    tasks = max(1, int(ray.available_resources().get("CPU", 0)) // workers)
    found = ray.data.from_items(rows, override_num_blocks=min(len(rows), _TASKS))
    found = found.map_batches(task, batch_size=1, batch_format="numpy", num_cpus=0, concurrency=tasks)
    found.context.enable_progress_bars = False
    found.context.execution_options.preserve_order = True
    for row in found.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, (ValueError, OSError)):
            raise result
        yield result


def _task(function: bytes, home: str, python_path: list[str]) -> Callable[..., Any]:
    """Return the task, which travels by value: our package may not be installed there."""

    def task(batch: dict[str, Any]) -> dict[str, list[bytes]]:
        if home not in sys.path:
            sys.path.append(home)
        from launcher.clusters.remote.from_driver import adopt
        from launcher.config.targets import add_calling_directory

        adopt()

        for path in python_path:
            add_calling_directory(path)
        read = pickle.loads(function)
        results = []
        for item in batch["item"]:
            try:
                results.append(pickle.dumps(read(pickle.loads(item)), protocol=5))
            except (ValueError, OSError) as error:  # raised by the reader: Ray would wrap it
                results.append(pickle.dumps(error))
        return {"result": results}

    return task
