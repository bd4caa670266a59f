"""Functions of Ray that are not its public API, by the names that launch uses for them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.errors import RayVersionError

# The label that Ray gives to each node. A public name; `ray._raylet.RAY_NODE_ID_KEY` holds it as well.
NODE_ID_LABEL = "ray.io/node-id"
# Reasons for a drain, DrainNodeReason of ray/core/generated/autoscaler.proto.
IDLE_TERMINATION = 1  # rejected by a node with running work
PREEMPTION = 2  # cannot be rejected
_ALIVE = 0  # GcsNodeInfo.ALIVE of ray/core/generated/gcs.proto


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Replace an attribute of a module or class of Ray for the length of the block.

    Raises:
        RayVersionError: the installed Ray has no such attribute, so that the replacement would have no effect.
    """
    before = attribute(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


def attribute(owner: Any, name: str) -> Any:
    """Return an attribute of a module or class of Ray.

    Raises:
        RayVersionError: the installed Ray has no such attribute.
    """
    if not hasattr(owner, name):
        import ray

        where = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
        raise RayVersionError(
            f"The installed Ray {ray.__version__} has no {where}.{name}, which launch adapts. Install a release of Ray "
            "that this version of launch supports: `pip show launch-train` lists it under Requires, and "
            "docs/compatibility.md names the tested releases."
        )
    return getattr(owner, name)


# ---- a cluster, without being its driver ----------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeInfo:
    """A node that a cluster's GCS treats as alive."""

    id: str
    host: str
    address: str
    port: int
    resources: dict[str, float]


def gcs_client(address: str) -> Any:
    """Return a client of the GCS at HOST:PORT. It does not make this process a driver.

    Why: `ray.init` needs a Ray process on the same machine, and reserves a job.
    Since: 2.44 or older.
    Without: no `launch plan` with cluster=existing, no notices of evictions, no orders for a driver on the head.
    """
    from ray._raylet import GcsClient

    return GcsClient(address=address)


def own_gcs_client() -> Any:
    """Return the client through which this process is connected to its cluster.

    Why: `ray.util.state` needs the dashboard, which an embedded Ray does not have.
    Since: 2.44 or older.
    Without: no events from workers.
    """
    from ray.experimental import internal_kv

    return internal_kv.internal_kv_get_gcs_client()


def living_nodes(client: Any, seconds: float) -> list[NodeInfo]:
    """Return the nodes that a GCS treats as alive. seconds: the time limit.

    Why: `ray.nodes()` needs a driver.
    Since: 2.44 or older.
    Without: as for `gcs_client`.
    """
    found = client.get_all_node_info(timeout=seconds, state_filter=_ALIVE)
    return [
        NodeInfo(
            id=key.hex(),
            host=info.node_manager_hostname,
            address=info.node_manager_address,
            port=info.node_manager_port,
            resources=dict(info.resources_total),
        )
        for key, info in found.items()
        if info.state == _ALIVE
    ]


def draining_nodes(client: Any, seconds: float) -> dict[str, float]:
    """Return the deadlines (seconds since the epoch, 0: none) of the nodes that Ray drains, by node id.

    Why: no public function names them.
    Since: 2.60. Before, only the cluster that this process is connected to could be asked, without a time limit.
    Without: a node that Kubernetes or an autoscaler drains is lost without a checkpoint.
    """
    if hasattr(client, "get_draining_nodes"):
        found = client.get_draining_nodes(timeout=seconds)
    else:
        import ray

        found = ray._private.state.state.get_draining_nodes()
    return {node: deadline / 1000 for node, deadline in found.items()}


def drain(client: Any, node: str, reason: int, message: str, deadline: float, seconds: float) -> str | None:
    """Stop placing work on a node; return why Ray rejects it, None when it accepts. It cannot be undone.

    Why: `ray drain-node` is a command without documentation, and starts a Python process.
    Since: 2.44 or older.
    Without: new workers are placed on a machine that is about to be evicted.

    Args:
        reason: IDLE_TERMINATION or PREEMPTION.
        deadline: seconds since the epoch, until which running work may continue; 0: none.
    """
    accepted, why = client.drain_node(node, reason, message, int(deadline * 1000), timeout=seconds)
    return None if accepted else str(why) or "no reason was given"


def has_jobs(client: Any, seconds: float) -> bool:
    """Return whether a driver of a user is connected to the cluster.

    Why: the public Jobs API lists only submitted jobs, not drivers.
    Since: 2.44 or older.
    Without: the watchdog of an Azure cluster removes nodes between two trials.
    """
    jobs = client.get_all_job_info(timeout=seconds).values()
    return any(not job.is_dead and not job.config.ray_namespace.startswith("_ray_internal") for job in jobs)


def in_use(address: str) -> bool:
    """Return whether a CPU or GPU of the cluster at HOST:PORT is reserved.

    Why: `ray.available_resources()` needs a driver, and a driver counts as work.
    Since: 2.44 or older.
    Without: as for `has_jobs`.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(address)
    return any(usage.used for usage in status.cluster_resource_usage if usage.resource_name in ("CPU", "GPU"))


def request_gpu_nodes(address: str, count: int, gpus: int) -> None:
    """Ask the autoscaler at HOST:PORT for `count` nodes with `gpus` GPUs each; 0 takes the request back.

    Why: the public `request_resources` needs a driver.
    Since: 2.44 or older.
    Without: no `launch up` with cluster=azure.
    """
    from ray.autoscaler.v2.sdk import request_cluster_resources

    request_cluster_resources(address, [{"resources": {"GPU": gpus}, "label_selector": {}}] * count)


def refresh_settings() -> None:
    """Make Ray's native code read the environment again. It reads it once, when ray is imported.

    Why: token and authentication mode are set after that import, and differ from cluster to cluster.
    Since: 2.52, which introduced tokens.
    Without: a connection with token authentication is refused.
    """
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


# ---- this process as a driver ---------------------------------------------------------------------------------------


def init_options(address: str, scratch: str | None = None) -> dict[str, str]:
    """Return options of `ray.init`: the address of this node and the directory of Ray's own files.

    Why: both options are undocumented. Ray would choose the address of the default route, and /tmp/ray.
    Since: 2.44 or older.
    Without: Ray listens on the network, and other users may read its files.
    """
    return {"_node_ip_address": address} | ({"_temp_dir": scratch} if scratch is not None else {})


def driver_job_config() -> Any:
    """Return a job configuration that keeps the current directory off the module path of the workers.

    Workers add the calling directory themselves (`launcher.config.calling_directory`), behind launch's own packages.

    Why: Ray puts the driver's directory first, and has no option for it.
    Since: 2.44 or older.
    Without: a `models.py` in the calling directory shadows a package of launch in the workers.
    """
    from ray.job_config import JobConfig

    here = os.path.realpath(os.curdir)

    class OtherPaths(list[str]):
        def extend(self, paths: Iterable[str]) -> None:
            super().extend(path for path in paths if os.path.realpath(path) != here)

    config = JobConfig()
    attribute(config, "_py_driver_sys_path")
    config._py_driver_sys_path = OtherPaths()
    return config


@contextlib.contextmanager
def quiet_errors() -> Iterator[None]:
    """Do not print Ray's messages about lost workers and nodes: connect to Ray within this block.

    Why: launch reports a lost worker itself, in one line. `log_to_driver=False` does not cover these messages.
    Since: 2.44 or older.
    Without: several lines of Ray's appear for each lost worker.
    """
    from ray._private import worker

    with replaced(worker, "listen_error_messages", lambda *_: None):
        yield


def dead_process() -> str | None:
    """Return the name of a process of this process's Ray that has ended; None while all are alive.

    Why: a driver waits for a minute for a GCS that has ended.
    Since: 2.44 or older.
    Without: a killed Ray is noticed a minute later.
    """
    from ray._private import worker

    node = worker._global_node
    return next((name for name, _ in node.dead_processes()), None) if node is not None else None


def drop_exception_hook() -> None:
    """Remove Ray's `sys.excepthook`.

    Why: it reports the exception to the GCS, and waits for it even if it has ended.
    Since: 2.44 or older.
    Without: an error after the loss of Ray is printed a minute later.
    """
    sys.excepthook = sys.__excepthook__


def drop_exit_hook() -> None:
    """Do not shut Ray down again at the end of this process.

    Why: Ray registers `ray.shutdown`, which waits for a GCS that has ended.
    Since: 2.44 or older.
    Without: a command ends a minute after it has lost its Ray.
    """
    import ray

    atexit.unregister(ray.shutdown)


def quiet_jobs_client() -> None:
    """Do not log what the client of Ray Jobs uploads.

    Why: its loggers have no option.
    Since: 2.44 or older.
    Without: two lines of Ray's for each submitted run.
    """
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---- resources ------------------------------------------------------------------------------------------------------


def visible_gpus() -> int:
    """Return how many GPUs of this machine this process may use. Imports no torch.

    Why: Ray knows the accelerators of several vendors, and its public functions need a running Ray.
    Since: 2.44 or older.
    Without: `launch plan` cannot count GPUs before Ray starts.
    """
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None:
        return 0
    visible = manager.get_current_process_visible_accelerator_ids()  # None: CUDA_VISIBLE_DEVICES is not set
    found = int(manager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


def free_resources() -> dict[str, dict[str, float]]:
    """Return what is free on each node of the cluster that this process is connected to, by node id.

    Why: the public `ray.available_resources()` is a sum over the nodes, and a worker must fit on one.
    Since: 2.44 or older.
    Without: no elastic training.
    """
    import ray

    return ray._private.state.state.available_resources_per_node()


def leaving_nodes() -> set[str]:
    """Return the ids of the nodes that Ray drains, of the cluster that this process is connected to.

    Why: no public function names them.
    Since: 2.44 or older.
    Without: a group is placed on a machine that is about to be evicted.
    """
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def free_placement_group(group: str) -> None:
    """Release the placement group with this id (hexadecimal).

    Why: the public API finds a group only by its name, and Ray Train gives it none.
    Since: 2.44 or older.
    Without: the reservation of a controller that died stays as long as the cluster.
    """
    import ray
    from ray.util.placement_group import PlacementGroup

    ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
