"""A subclass of Ray's Azure node provider.

It runs on this machine under `ray up`, which creates the head, and on the head, where the autoscaler creates the nodes.
It differs from Ray's provider as follows:

* Nodes have a separate identity that may not change the resource group. Ray assigns the head's identity to all VMs.
* The zone is the configured one. Ray queries the zones of the size, which the head's identity is not allowed to do.
* With spot=prefer, nodes are created on demand if Azure rejects spot. Ray's autoscaler (v2) retries a rejected launch
  forever.
* SSH host keys are stored and verified. Ray disables the verification (StrictHostKeyChecking=no).
* Failed launches are recorded for the user (`failures`). After `launch_attempts` failures there are no further launches
  for a while.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from typing import Any

from azure.core.exceptions import AzureError
from ray.autoscaler._private._azure.config import _configure_key_pair
from ray.autoscaler._private._azure.node_provider import AzureNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_LAUNCH_REQUEST, TAG_RAY_NODE_KIND

from launcher.clusters.azure import failures

_SPOT_PARAMETERS = ("priority", "evictionPolicy", "billingProfile")


class Provider(AzureNodeProvider):
    """The node provider of one Ray process that manages the cluster.

    Args:
        provider_config: the section `provider` of the configuration; see `ray_yaml.ray_config`.
        cluster_name: the name of the cluster.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._lock = threading.Lock()  # guards the record of failures

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration with the public key added. Resource group and network already exist (`network`)."""
        configured: dict[str, Any] = _configure_key_pair(cluster_config)
        return configured

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Create the head or nodes. If spot nodes are rejected and `on_demand_instead` is set, create them on demand.

        Raises:
            NodeLaunchException: Azure rejected the launch, or too many launches have failed.
        """
        if tags.get(TAG_RAY_NODE_KIND) != NODE_KIND_WORKER:
            self._create("", node_config, tags, count)
            return
        # Launches run concurrently, so each needs a separate provider_config.
        own = copy.copy(self)
        own.provider_config = {**self.provider_config, "msi": self.provider_config["nodes_msi"]}
        parameters = node_config["azure_arm_parameters"]
        options = [(failures.SPOT if "priority" in parameters else failures.ON_DEMAND, node_config)]
        if "priority" in parameters and self.provider_config["on_demand_instead"]:
            plain = {key: value for key, value in parameters.items() if key not in _SPOT_PARAMETERS}
            options.append((failures.ON_DEMAND, {**node_config, "azure_arm_parameters": plain}))
        most = int(self.provider_config["launch_attempts"])
        refusal = NodeLaunchException("TooManyFailures", f"{most} launches of nodes failed", None)
        allowed = [(kind, config) for kind, config in options if failures.recent(kind) < most]
        if not allowed:
            time.sleep(1.0)  # Ray retries immediately
        for kind, config in allowed:
            try:
                own._create(kind, config, tags, count - self._created(tags))
                return
            except NodeLaunchException as error:
                refusal = error
        raise refusal

    def get_command_runner(self, log_prefix: str, node_id: str, *arguments: Any, **more: Any) -> Any:
        """Return Ray's SSH command runner for a node, with verification of the host key.

        The first key of a machine is accepted, since the machine was just created. The IP address of a deleted node may
        be assigned to a new one, so the keys of nodes are stored by node id. The key of the head is stored by address,
        as in `launcher.clusters.azure.lifecycle`.
        """
        runner = super().get_command_runner(log_prefix, node_id, *arguments, **more)
        options = runner.ssh_options.arg_dict
        options["StrictHostKeyChecking"] = "accept-new"
        options["UserKnownHostsFile"] = self.provider_config["known_hosts"]
        if self.node_tags(node_id).get(TAG_RAY_NODE_KIND) == NODE_KIND_WORKER:
            options["UserKnownHostsFile"] = "~/.ssh/launch_known_hosts"  # on the head, which connects to nodes
            options["HostKeyAlias"] = node_id
        return runner

    def _create(self, kind: str, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        try:
            AzureNodeProvider.create_node(self, node_config, tags, count)
        except (AzureError, ValueError) as error:
            found = failures.failure_of(error, kind, count)
            with self._lock:
                failures.add(found)
            raise NodeLaunchException(found.code[:20], found.message, sys.exc_info()) from error
        with self._lock:
            failures.forget(kind)

    def _created(self, tags: dict[str, str]) -> int:
        """Return how many VMs a launch has already created, since a failed deployment may have created some."""
        request = tags.get(TAG_RAY_LAUNCH_REQUEST)
        return len(self.non_terminated_nodes({TAG_RAY_LAUNCH_REQUEST: request})) if request else 0

    def _get_zones_for_vm_size(self, vm_size: str, location: str) -> list[str]:
        return list(self._parse_availability_zones(self.provider_config.get("availability_zone")) or [])
