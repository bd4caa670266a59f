"""Ray's Azure provider, with what it leaves open.

Runs on this machine under `ray up`, which makes the head, and on the head, whose autoscaler makes the nodes. What Ray's
does, its code does; here

* nodes get an identity of their own, which may not change the group (Ray's gives all VMs the head's);
* zones are taken as they were chosen: who may act in one group alone may not list the zones of sizes;
* a launch that fails is kept for the user (`failures`), and after `launch_attempts` of them no other is tried until
  `launch up` is called again.
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
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from launcher.clusters.azure import failures


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
        """Raises NodeLaunchException where Azure refuses, which has Ray prefer another kind of node for a while."""
        from azure.core.exceptions import AzureError

        kind = tags.get(TAG_RAY_USER_NODE_TYPE, "")
        own = self
        if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_WORKER:
            most = int(self.provider_config["launch_attempts"])
            if failures.recent(kind) >= most:
                time.sleep(1.0)  # Ray asks again at once
                raise NodeLaunchException("GivenUp", f"{most} launches of {kind} nodes failed", None)
            # Launches run side by side: each has what it sends apart.
            own = copy.copy(self)
            own.provider_config = {**self.provider_config, "msi": self.provider_config["nodes_msi"]}
        try:
            AzureNodeProvider.create_node(own, node_config, tags, count)
        except (AzureError, ValueError) as error:
            found = failures.failure_of(error, kind, count)
            with self._kept:
                failures.add(found)
            raise NodeLaunchException(found.code[:20], found.message, sys.exc_info()) from error
        with self._kept:
            failures.forget(kind)

    def _get_zones_for_vm_size(self, vm_size: str, location: str) -> list[str]:
        return list(self._parse_availability_zones(self.provider_config.get("availability_zone")) or [])
