"""What workers have from the process that drives them: values of variables, and the disk of its machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.clusters.remote.compare import NODE_SECONDS
from launcher.ray_seam import kv


def _environment_key() -> str:
    import ray

    return f"environment/{ray.get_runtime_context().get_job_id()}"


def share_environment(names: Sequence[str]) -> None:
    """Have the workers of this driver find the values of these variables; of none: have them find nothing.

    They go through the memory of the head's key-value store. Ray's own way, a runtime environment, shows them in its
    logs and in lists of processes.
    """
    values = {name: os.environ[name] for name in names if name in os.environ}
    if values:
        kv.put(_environment_key(), json.dumps(values))
    else:
        kv.delete(_environment_key())


def adopt() -> None:
    """In a worker: take over the variables that its driver shares, and the way to its disk."""
    found = kv.get(_environment_key())
    if found is not None:
        os.environ.update(json.loads(found))
    _reach_disk()


_DISK = "launch-disk"


_DISK_SECONDS = 60.0


def serve_disk() -> Any:
    """Start the process through which workers on other nodes use the disk of this one; it ends with this driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    home = str(Path(__file__).resolve().parents[3])

    class HeadDisk:  # within a function it travels by value
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
    disk = ray.remote(**options)(HeadDisk).options(name=_DISK, scheduling_strategy=here).remote()
    ray.get(disk.node.remote(), timeout=NODE_SECONDS)
    return disk


def _reach_disk() -> None:
    """Where the driver serves its disk and this is another node, have files of the run go there."""
    import ray

    try:
        disk = ray.get_actor(_DISK)
    except ValueError:  # none is served
        return
    if ray.get(disk.node.remote(), timeout=NODE_SECONDS) == ray.get_runtime_context().get_node_id():
        return
    from launcher.runs import gathered

    def call(name: str, *arguments: Any) -> Any:
        try:
            return ray.get(disk.do.remote(name, arguments), timeout=_DISK_SECONDS)
        except OSError:
            raise
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"the head of the cluster did not answer: {said}") from None

    gathered.through(call)
