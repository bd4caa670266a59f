"""Names that Ray's processes read, and the programs that start and query them.

This file is also sent to hosts that have no launch yet (`launcher.clusters.remote.bootstrap`): it runs on Python 3.8,
and imports the standard library alone.
"""

from __future__ import annotations

# Ray's metrics are off: the ports of its agents, its dashboard and its autoscaler require no token. The last two have
# no switch: an invalid port prevents them from listening.
# Why: a private Ray must not serve unauthenticated ports. Since: 2.44 or older. Without: all machines on the network
# can read the metrics of a cluster, with the names of its processes.
NO_METRICS = {"RAY_enable_metrics_collection": "0", "DASHBOARD_METRIC_PORT": "-1", "AUTOSCALER_METRIC_PORT": "-1"}

# The environment of every process of an embedded Ray, in addition to the user's own.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    # Why: a worker without a GPU keeps the user's CUDA_VISIBLE_DEVICES. Since: 2.52. Without: one warning a
    # worker, and in a later release hidden GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Why: Ray writes process titles over argv and the environment, and the reaper finds Ray's processes by their
    # environment. Since: 2.44 or older (setproctitle reads it). Without: processes may be left after a killed command.
    "SPT_NOENV": "1",
    **NO_METRICS,
}

# What Ray Train reads in the controller and in the workers.
RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # the time until the end of a worker is detected
    # Why: one actor less; launch watches for evictions itself. Since: 2.58. Without: a slower start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Why: prints of user code go through launch's own events. Since: 2.44 or older. Without: each line appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Why: the workers of one machine reach each other's GPUs. Since: 2.44 or older. Without: NCCL copies through the
    # host's memory.
    "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",
}
# Why: these limits are read from the controller's environment alone. Since: 2.44 or older. Without: a worker that hangs
# is noticed after ten minutes instead of `scaling.timeout`.
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

# The `ray` command as arguments of an interpreter.
# Why: the script `ray` may be missing from PATH, or belong to another environment. Since: 2.44 or older. Without: a
# host needs the environment's folder of scripts on its PATH.
COMMAND = ("-m", "ray.scripts.scripts")

# A program that exits with 0 if `ray start --head` starts the server of Ray Client, which needs gRPC.
# Why: its default port is fixed, and an explicit one is an error without gRPC. Since: 2.44 or older. Without: a second
# cluster cannot start on a host.
HAS_CLIENT = "import importlib.util, sys; sys.exit(importlib.util.find_spec('grpc') is None)"

# A program that prints the nodes of the cluster at its first argument, lost ones included, as one line of JSON.
# Why: the public state API needs the dashboard. Since: 2.44 or older. Without: `launch status` cannot name the lost
# hosts of cluster=ssh.
NODES = """
import json, sys
from ray._raylet import GcsClient
found = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10).values()
print(json.dumps([
    {"address": node.node_manager_address, "lives": node.state == 0, "ended": node.end_time_ms / 1000,
     "why": node.death_info.reason_message, "cpus": node.resources_total.get("CPU", 0.0),
     "gpus": node.resources_total.get("GPU", 0.0)}
    for node in found
]))
"""
