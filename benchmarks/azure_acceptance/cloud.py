"""Requests to Azure in addition to the product's verbs: an eviction, and a check that the resource group is gone."""

from __future__ import annotations

from typing import Any

from launcher.clusters.azure.api import Api, sign_in, translated_errors
from launcher.clusters.azure.spec import group_of
from launcher.clusters.remote.mounts import READER, Mount, role_lines

CONTRIBUTOR = "Storage Blob Data Contributor"


class Cloud:
    """The account, seen through the product's own client. Raises ClusterError if Azure refuses."""

    def __init__(self, name: str, subscription: str | None) -> None:
        self.group = group_of(name)
        self._name, self._subscription = name, subscription

    def _api(self) -> Api:
        return Api(sign_in(self._subscription))

    def machines(self) -> list[dict[str, Any]]:
        with translated_errors("Asking for the machines"):
            return self._api().machines(self.group)

    def workers(self) -> list[dict[str, Any]]:
        return [vm for vm in self.machines() if vm["kind"] != "head"]

    def evict(self, vm: str) -> None:
        """Let Azure evict a spot VM as if it needed the capacity: with a notice, within 30 minutes.

        https://learn.microsoft.com/rest/api/compute/virtual-machines/simulate-eviction
        """
        with translated_errors("Simulating an eviction"):
            self._api().compute.virtual_machines.simulate_eviction(self.group, vm)

    def exists(self) -> bool:
        with translated_errors("Looking for the resource group"):
            return self._api().group(self.group) is not None

    def left(self) -> list[str]:
        """Return the types of the resources that are still in the group."""
        with translated_errors("Looking for what is left"):
            return sorted(one.split()[0] for one in self._api().remaining(self.group))

    def role_lines(self, blob: str) -> list[str]:
        """Return the commands that let the cluster write to a container; they contain ids, so no report shows them."""
        api = self._api()
        group = f"/subscriptions/{api.account.subscription}/resourceGroups/{self.group}/providers"
        kind = f"{group}/Microsoft.ManagedIdentity/userAssignedIdentities"
        container, _, account = blob.partition("://")[2].partition("/")[0].partition("@")
        mount = Mount("/blob", account.partition(".")[0], container)
        with translated_errors("Asking for the identities"):
            who = {part: api.principal(f"{kind}/{self._name}-{part}") for part in ("head", "nodes")}
        return [line.replace(READER, CONTRIBUTOR) for line in role_lines([mount], who)]
