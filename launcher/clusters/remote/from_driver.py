"""What a driver shares with its workers: values of environment variables, and the disk of its machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.clusters.remote.compare import NODE_SECONDS
from launcher.ray_seam import kv
from launcher.runs import gathered

_DISK = "launch-disk"  # name of the actor
_DISK_SECONDS = 60.0


def _environment_key() -> str:
    return f"environment/{ray.get_runtime_context().get_job_id()}"


def share_environment(names: Sequence[str]) -> None:
    """Share the values of these environment variables with the workers of this driver. No names: share nothing.

    The values are kept in the memory of the cluster's key-value store. A runtime environment of Ray would show them in
    logs and in lists of processes.
    """
    values = {name: os.environ[name] for name in names if name in os.environ}
    if values:
        kv.put(_environment_key(), json.dumps(values))
    else:
        kv.delete(_environment_key())


def adopt() -> None:
    """Set the variables that the driver shares, and connect to its disk. Called in a worker."""
    found = kv.get(_environment_key())
    if found is not None:
        os.environ.update(json.loads(found))
    _reach_disk()


def serve_disk() -> Any:
    """Start the actor through which workers on other nodes use the disk of this node. It ends with this driver.

    Returns:
        the actor, for `wait_for_disk`.
    """
    home = str(Path(__file__).resolve().parents[3])

    class HeadDisk:  # defined in a function, so that it is pickled by value
        def __init__(self) -> None:
            if home not in sys.path:
                sys.path.append(home)
            from launcher.runs.gathered import Disk

            self._disk = Disk()

        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

        def do(self, name: str, arguments: tuple[Any, ...]) -> Any:
            return getattr(self._disk, name)(*arguments)

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 16, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(**options)(HeadDisk).options(name=_DISK, scheduling_strategy=here).remote()


def wait_for_disk(disk: Any) -> None:
    """Wait until the actor of `serve_disk` can be used."""
    ray.get(disk.node.remote(), timeout=NODE_SECONDS)


def _reach_disk() -> None:
    """Write the files of the run to the driver's disk, if the driver serves it and this is another node."""
    try:
        disk = ray.get_actor(_DISK)
    except ValueError:  # the driver serves no disk
        return
    if ray.get(disk.node.remote(), timeout=NODE_SECONDS) == ray.get_runtime_context().get_node_id():
        return

    def call(name: str, *arguments: Any) -> Any:
        try:
            return ray.get(disk.do.remote(name, arguments), timeout=_DISK_SECONDS)
        except OSError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"the head of the cluster did not answer: {first}") from None

    gathered.through(call)
