"""Ray's Azure provider, with what it leaves open.

Runs on this machine under `ray up`, which makes the head, and on the head, whose autoscaler makes the nodes. What Ray's
does, its code does; here

* nodes get an identity of their own, which may not change the group (Ray's gives all VMs the head's);
* zones are taken as they were chosen: who may act in one group alone may not list the zones of sizes;
* where spot is preferred and refused, the nodes are made on demand: Ray's autoscaler (v2) would turn to another kind of
  node where machines come late, but asks again and again for those that are refused;
* host keys are kept and compared: Ray's SSH takes any (StrictHostKeyChecking=no, and forgets it);
* a launch that fails is kept for the user (`failures`), and after `launch_attempts` of them no other is tried for a
  while.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from typing import Any

from ray.autoscaler._private._azure.config import _configure_key_pair
from ray.autoscaler._private._azure.node_provider import AzureNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_LAUNCH_REQUEST, TAG_RAY_NODE_KIND

from launcher.clusters.azure import failures

_OF_SPOT = ("priority", "evictionPolicy", "billingProfile")


class Provider(AzureNodeProvider):
    """One of these per process of Ray that manages the cluster. `provider_config`: the section of `ray_yaml`."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._kept = threading.Lock()  # of the file of failures

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration with the public key in it. Group and network are there already (`network`)."""
        configured: dict[str, Any] = _configure_key_pair(cluster_config)
        return configured

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Make the head, or nodes: on spot where that is wanted, and where `on_demand_instead` says so also without.

        Raises:
            NodeLaunchException: Azure refuses, or has refused too often.
        """
        if tags.get(TAG_RAY_NODE_KIND) != NODE_KIND_WORKER:
            self._create("", node_config, tags, count)
            return
        # Launches run side by side: each has what it sends apart.
        own = copy.copy(self)
        own.provider_config = {**self.provider_config, "msi": self.provider_config["nodes_msi"]}
        asked = node_config["azure_arm_parameters"]
        ways = [(failures.SPOT if "priority" in asked else failures.ON_DEMAND, node_config)]
        if "priority" in asked and self.provider_config["on_demand_instead"]:
            plain = {key: value for key, value in asked.items() if key not in _OF_SPOT}
            ways.append((failures.ON_DEMAND, {**node_config, "azure_arm_parameters": plain}))
        most = int(self.provider_config["launch_attempts"])
        refused = NodeLaunchException("GivenUp", f"{most} launches of nodes failed", None)
        allowed = [(way, config) for way, config in ways if failures.recent(way) < most]
        if not allowed:
            time.sleep(1.0)  # Ray asks again at once
        for way, config in allowed:
            try:
                own._create(way, config, tags, count - self._made(tags))
                return
            except NodeLaunchException as error:
                refused = error
        raise refused

    def get_command_runner(self, log_prefix: str, node_id: str, *arguments: Any, **more: Any) -> Any:
        """Return Ray's runner of commands on a node over SSH, with host keys that are kept and compared.

        The first key of a machine is taken: it was made a minute ago. A node gets the address of one that is gone, so
        nodes are known by their ids; the head is known by its address, as it is to `launcher.clusters.azure.lifecycle`.
        """
        runner = super().get_command_runner(log_prefix, node_id, *arguments, **more)
        options = runner.ssh_options.arg_dict
        options["StrictHostKeyChecking"] = "accept-new"
        options["UserKnownHostsFile"] = self.provider_config["known_hosts"]
        if self.node_tags(node_id).get(TAG_RAY_NODE_KIND) == NODE_KIND_WORKER:
            options["UserKnownHostsFile"] = "~/.ssh/launch_known_hosts"  # of the head, which starts them
            options["HostKeyAlias"] = node_id
        return runner

    def _create(self, way: str, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        from azure.core.exceptions import AzureError

        try:
            AzureNodeProvider.create_node(self, node_config, tags, count)
        except (AzureError, ValueError) as error:
            found = failures.failure_of(error, way, count)
            with self._kept:
                failures.add(found)
            raise NodeLaunchException(found.code[:20], found.message, sys.exc_info()) from error
        with self._kept:
            failures.forget(way)

    def _made(self, tags: dict[str, str]) -> int:
        """Return how many VMs a launch has made already: a deployment may fail with some of its VMs there."""
        request = tags.get(TAG_RAY_LAUNCH_REQUEST)
        return len(self.non_terminated_nodes({TAG_RAY_LAUNCH_REQUEST: request})) if request else 0

    def _get_zones_for_vm_size(self, vm_size: str, location: str) -> list[str]:
        return list(self._parse_availability_zones(self.provider_config.get("availability_zone")) or [])
