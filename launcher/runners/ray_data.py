"""Reads streamed training data with Ray Data: in tasks on any node, while the workers train.

Each worker creates a data set of its own part for every epoch, so that the seed determines the order. Shards of
`ray.train.get_dataset_shard` are not used: with a streaming split, each worker waits for all others at the end of an
epoch, and the order is fixed before training.

The tasks reserve no CPU. The workers may have reserved all CPUs, and a task that holds the last free one, while its
worker waits for another worker whose task needs a CPU, would cause a deadlock. Instead, the number of parallel tasks is
limited to the number of CPUs that are not reserved, and is at least one.
"""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray import cloudpickle

_TASKS = 256  # the most tasks in one epoch of one worker; if there are more items, each task reads several


def reader(home: str, python_path: list[str], workers: int) -> Callable[..., Iterator[Any]]:
    """Return a function like `map` that runs in tasks of Ray Data and keeps the order.

    A ValueError or OSError of the mapped function is raised unchanged, another error as an exception of Ray.

    Args:
        home, python_path: the directories of launch and of the modules that the mapped function needs.
        workers: the number of workers that share the cluster.
    """

    def apply(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        rows = [{"item": pickle.dumps(item)} for item in items]
        return _apply(rows, _task(cloudpickle.dumps(function), home, python_path), workers) if rows else iter(())

    return apply


def _apply(rows: list[dict[str, bytes]], task: Callable[..., Any], workers: int) -> Iterator[Any]:
    import ray.data  # takes a second, and only streamed data need it

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
    """Return the task. It is pickled by value, since launch may not be installed on the node."""

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
            except (ValueError, OSError) as error:  # Ray would wrap the exception
                results.append(pickle.dumps(error))
        return {"result": results}

    return task
