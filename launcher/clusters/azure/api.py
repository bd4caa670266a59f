"""A client of Azure's management API that reports its errors as sentences.

Importing this module requires the packages of the extra `azure`; see `launcher.clusters.azure.kind`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    ResourceNotFoundError,
    ServiceRequestError,
)
from azure.identity import AzureCliCredential, CredentialUnavailableError
from azure.mgmt.compute import ComputeManagementClient
from azure.mgmt.network import NetworkManagementClient
from azure.mgmt.resource import ResourceManagementClient

from launcher.clusters.azure.failures import failure_of
from launcher.errors import ClusterError

SCOPE = "https://management.azure.com/.default"
POLL_SECONDS = 2  # between two polls of a long operation, unless Azure specifies an interval
_SECONDS = 60
KIND_TAG = "ray-user-node-type"  # set by Ray on each VM: "head", or the node type


@dataclass(frozen=True)
class Account:
    """An Azure login: the id and display name of the subscription, and the credential for requests."""

    subscription: str
    name: str
    credential: Any


def sign_in(subscription: str | None = None) -> Account:
    """Return the account of `az login`. The credential is not written to any file.

    Args:
        subscription: the id or name of a subscription; None: the default of `az account show`.

    Raises:
        ClusterError: `az` is missing, the user is not logged in, the login has expired, or it has no access to the
            subscription. Each cause has its own message.
    """
    if shutil.which("az") is None:
        raise ClusterError(
            "cluster=azure needs the Azure command line `az` for your login, but it is not on PATH. Install it "
            "(https://aka.ms/azure-cli), then run `az login`."
        )
    options = ["--subscription", subscription] if subscription else []
    try:
        done = subprocess.run(
            ["az", "account", "show", "--output", "json", *options], capture_output=True, text=True, timeout=_SECONDS
        )
        if done.returncode:
            raise _login_error(done.stderr, subscription)
        account = json.loads(done.stdout)
        credential = AzureCliCredential(subscription=account["id"], process_timeout=_SECONDS)
        credential.get_token(SCOPE)
    except (CredentialUnavailableError, ClientAuthenticationError) as error:
        raise _login_error(error.message or str(error), subscription) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"`az account show` did not answer within {_SECONDS} s. Run it in a shell to see the cause."
        ) from None
    except (ValueError, KeyError):
        raise ClusterError(
            "`az account show --output json` did not print the expected JSON. Update az, then retry."
        ) from None
    return Account(account["id"], account.get("name", account["id"]), credential)


def _login_error(output: str, subscription: str | None) -> ClusterError:
    output = " ".join(output.split())
    if subscription and re.search(r"doesn't exist|not found|could not be found", output, re.IGNORECASE):
        return ClusterError(
            f"cluster.subscription={subscription} does not exist, or your login has no access to it. `az account list` "
            "shows your subscriptions."
        )
    if re.search(r"expired|AADSTS(50078|50173|70043|700082|70008)|interaction.required", output, re.IGNORECASE):
        code = re.search(r"AADSTS\d+|ExpiredAuthenticationToken", output)
        shown = f" ({code[0]})" if code else ""
        return ClusterError(f"Your Azure login has expired{shown}. Run `az login`, then retry.")
    if "az login" in output:
        return ClusterError("You are not logged in to Azure on this machine. Run `az login`, then retry.")
    return ClusterError(f"`az` returned no token: {output[:400]} Run `az login`, then retry.")


@contextlib.contextmanager
def translated_errors(action: str) -> Iterator[None]:
    """Raise ClusterError instead of an error of Azure's SDK.

    Args:
        action: what the block does, for the message, such as `Creating the network of demo`.
    """
    try:
        yield
    except ClientAuthenticationError as error:
        raise _login_error(str(error.message or error), None) from error
    except ServiceRequestError as error:
        raise ClusterError(
            f"{action} failed: Azure is unreachable from this machine ({str(error)[:300]}). Check the network and the "
            "proxy settings."
        ) from error
    except AzureError as error:
        raise ClusterError(f"{action} failed: Azure rejected the request. {failure_of(error, '', 0)}") from error


class Api:
    """The requests that launch sends to Azure. Each SDK client is created on first use."""

    def __init__(self, account: Account) -> None:
        self.account = account

    @cached_property
    def compute(self) -> Any:
        return ComputeManagementClient(self.account.credential, self.account.subscription)

    @cached_property
    def network(self) -> Any:
        return NetworkManagementClient(self.account.credential, self.account.subscription)

    @cached_property
    def resources(self) -> Any:
        return ResourceManagementClient(
            self.account.credential, self.account.subscription, polling_interval=POLL_SECONDS
        )

    def group(self, name: str) -> Any | None:
        """Return the resource group, or None if it does not exist."""
        try:
            return self.resources.resource_groups.get(name)
        except ResourceNotFoundError:
            return None

    def deploy(self, group: str, name: str, template: dict[str, Any]) -> None:
        """Deploy a template into a resource group and wait until the deployment is complete."""
        deployment = {"properties": {"mode": "Incremental", "template": template, "parameters": {}}}
        self.resources.deployments.begin_create_or_update(group, name, deployment).result()

    def delete_group(self, name: str) -> None:
        """Delete a resource group with all its resources and wait for the end. Does nothing if it does not exist."""
        with contextlib.suppress(ResourceNotFoundError):
            self.resources.resource_groups.begin_delete(name).result()

    def remaining(self, group: str) -> list[str]:
        """Return the resources of a group, each as `type name`; empty if the group does not exist."""
        try:
            return [f"{one.type} {one.name}" for one in self.resources.resources.list_by_resource_group(group)]
        except ResourceNotFoundError:
            return []

    def principal(self, identity: str) -> str:
        """Return the principal id of a managed identity, which role assignments need. identity: its resource id."""
        found = self.resources.resources.get_by_id(identity, "2023-01-31")
        return str(found.properties["principalId"])

    def machines(self, group: str) -> list[dict[str, Any]]:
        """Return the VMs of a group, each with name, size, kind ("head" or the node type), spot, state (of power)."""
        found = []
        try:
            for vm in self.compute.virtual_machines.list(group):
                view = self.compute.virtual_machines.instance_view(group, vm.name)
                states = [
                    one.code.partition("/")[2] for one in view.statuses or [] if one.code.startswith("PowerState/")
                ]
                found.append(
                    {
                        "name": vm.name,
                        "size": vm.hardware_profile.vm_size,
                        "kind": (vm.tags or {}).get(KIND_TAG, ""),
                        "spot": vm.priority == "Spot",
                        "state": states[0] if states else "creating",
                    }
                )
        except ResourceNotFoundError:  # the group does not exist, or a VM was deleted in the meantime
            pass
        return found

    def head_address(self, group: str) -> str | None:
        """Return the public IP address of the head, or None.

        It is looked up through the network interface of the VM, since an interrupted `ray up` leaves other addresses.
        """
        heads = [vm for vm in self.compute.virtual_machines.list(group) if (vm.tags or {}).get(KIND_TAG) == "head"]
        for vm in heads:
            interface = vm.network_profile.network_interfaces[0].id.rpartition("/")[2]
            for place in self.network.network_interfaces.get(group, interface).ip_configurations:
                if place.public_ip_address:
                    name = place.public_ip_address.id.rpartition("/")[2]
                    return str(self.network.public_ip_addresses.get(group, name).ip_address or "") or None
        return None
