"""A driver for tests: trains on a cluster of small nodes with eviction agents, and evicts one of the nodes.

    python eviction_drive.py NODES HOW OVERRIDES…

HOW is "azure:SECONDS" (a notice of Scheduled Events), "withdrawn:SECONDS" (the same, withdrawn after two seconds) or
"sigterm:SECONDS" (to the agent of the node). The eviction of a node with a worker starts when step 3 is logged. The
last line of standard output is a JSON object with `result`, and `lost` (the VMs with lost or drained nodes).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from launcher import launch
from tests.support.scheduled_events import ScheduledEvents, event

SMALL = {"object_store_memory": 80_000_000}
METRICS = Path("runs/evicted/metrics.jsonl")


class Machine:
    """A node, its agent, and its metadata service."""

    def __init__(self, cluster: Cluster, number: int, term_seconds: str) -> None:
        self.node = cluster.add_node(num_cpus=1, **SMALL)
        self.events = ScheduledEvents(f"gpu-{number}")
        self.events.__enter__()
        words = ["--address", cluster.address, "--node-id", self.node.node_id, "--metadata", self.events.url]
        self.agent = subprocess.Popen(
            [sys.executable, "-m", "launcher.clusters.eviction", *words, "--term-seconds", term_seconds]
        )

    @property
    def works(self) -> bool:
        return ray._private.state.available_resources_per_node().get(self.node.node_id, {}).get("CPU", 0) == 0

    def end(self) -> None:
        self.agent.kill()
        self.agent.wait()
        self.events.__exit__()


def main() -> None:
    count, how, *words = sys.argv[1:]
    kind, _, seconds = how.partition(":")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
    machines = [Machine(cluster, number, seconds) for number in range(int(count))]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def evict() -> None:
        while not (METRICS.exists() and len(METRICS.read_text().splitlines()) >= 3):
            time.sleep(0.05)
        machine = next(machine for machine in machines if machine.works)
        if kind == "sigterm":
            machine.agent.send_signal(signal.SIGTERM)
            return
        machine.events.set(event(machine.events.vm, not_before=float(round(time.time() + float(seconds)))))
        if kind == "withdrawn":
            time.sleep(2)
            machine.events.set()

    threading.Thread(target=evict, daemon=True).start()
    found: dict[str, Any] = {}
    try:
        found["result"] = launch(*words, "run.name=evicted")
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        draining = ray._private.worker.global_worker.gcs_client.get_draining_nodes()
        found["lost"] = [machine.events.vm for machine in machines if machine.node.node_id not in nodes - set(draining)]
    finally:
        for machine in machines:
            machine.end()
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
