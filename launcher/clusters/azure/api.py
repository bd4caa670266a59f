"""What is asked of Azure's management API, with its errors as sentences.

The packages of the extra `azure` are imported when something is asked, as everything here may be read without them.
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

from launcher.errors import ClusterError

SCOPE = "https://management.azure.com/.default"
POLL_SECONDS = 2  # for what takes long, where Azure names no time
_SECONDS = 60
KIND_TAG = "ray-user-node-type"  # that Ray gives a VM: "head", or the kind of node


@dataclass(frozen=True)
class Account:
    """Who asks: the subscription that pays, and its name for people."""

    subscription: str
    name: str
    credential: Any


def sign_in(subscription: str | None = None) -> Account:
    """Return the account of `az login`. Nothing of it is written anywhere.

    Raises:
        ClusterError: the packages or `az` are missing, nobody is logged in, the login has expired, or it does not
            reach the subscription: each its own sentence.
    """
    try:
        from azure.core.exceptions import ClientAuthenticationError
        from azure.identity import AzureCliCredential, CredentialUnavailableError
    except ImportError as error:
        raise ClusterError(
            f"cluster=azure needs Azure's packages for Python ({error.name} is missing). Install them: "
            "pip install 'launch-train[azure]'."
        ) from None
    if shutil.which("az") is None:
        raise ClusterError(
            "cluster=azure needs Azure's command line `az` for your login, and there is none on PATH. Install it "
            "(https://aka.ms/azure-cli), then run `az login`."
        )
    chosen = ["--subscription", subscription] if subscription else []
    try:
        shown = subprocess.run(
            ["az", "account", "show", "--output", "json", *chosen], capture_output=True, text=True, timeout=_SECONDS
        )
        if shown.returncode:
            raise _refused(shown.stderr, subscription)
        account = json.loads(shown.stdout)
        credential = AzureCliCredential(subscription=account["id"], process_timeout=_SECONDS)
        credential.get_token(SCOPE)
    except (CredentialUnavailableError, ClientAuthenticationError) as error:
        raise _refused(error.message or str(error), subscription) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"`az account show` did not answer within {_SECONDS} s. Try it by hand.") from None
    except (ValueError, KeyError):
        raise ClusterError(
            "`az account show --output json` answers something else. Update az, then try again."
        ) from None
    return Account(account["id"], account.get("name", account["id"]), credential)


def _refused(said: str, subscription: str | None) -> ClusterError:
    said = " ".join(said.split())
    if subscription and re.search(r"doesn't exist|not found|could not be found", said, re.IGNORECASE):
        return ClusterError(
            f"cluster.subscription={subscription} is none that your login reaches. `az account list` shows them."
        )
    if re.search(r"expired|AADSTS(50078|50173|70043|700082|70008)|interaction.required", said, re.IGNORECASE):
        return ClusterError("Your Azure login has expired. Run `az login`, then try again.")
    if "az login" in said:
        return ClusterError("Nobody is logged in to Azure on this machine. Run `az login`, then try again.")
    return ClusterError(f"`az` gives no token: {said[:400]} Run `az login`, then try again.")


@contextlib.contextmanager
def translated_errors(doing: str) -> Iterator[None]:
    """Raise ClusterError in place of an error of Azure's SDK; `doing` says what was done, for the sentence."""
    from azure.core.exceptions import AzureError, ClientAuthenticationError, ServiceRequestError

    from launcher.clusters.azure.failures import failure_of

    try:
        yield
    except ClientAuthenticationError as error:
        raise _refused(str(error.message or error), None) from error
    except ServiceRequestError as error:
        raise ClusterError(f"{doing}: Azure cannot be reached from here ({str(error)[:300]}).") from error
    except AzureError as error:
        raise ClusterError(f"{doing}: Azure refuses. {failure_of(error, '', 0).words}") from error


class Api:
    """The few requests that launch makes itself. Errors of the SDK pass; `told` turns them into sentences."""

    def __init__(self, account: Account) -> None:
        self.account = account

    @cached_property
    def compute(self) -> Any:
        from azure.mgmt.compute import ComputeManagementClient

        return ComputeManagementClient(self.account.credential, self.account.subscription)

    @cached_property
    def network(self) -> Any:
        from azure.mgmt.network import NetworkManagementClient

        return NetworkManagementClient(self.account.credential, self.account.subscription)

    @cached_property
    def resources(self) -> Any:
        from azure.mgmt.resource import ResourceManagementClient

        return ResourceManagementClient(
            self.account.credential, self.account.subscription, polling_interval=POLL_SECONDS
        )

    def group(self, name: str) -> Any | None:
        """Return the resource group, or None where there is none."""
        from azure.core.exceptions import ResourceNotFoundError

        try:
            return self.resources.resource_groups.get(name)
        except ResourceNotFoundError:
            return None

    def deploy(self, group: str, name: str, template: dict[str, Any]) -> None:
        """Deploy a template into a group and wait for its end."""
        wish = {"properties": {"mode": "Incremental", "template": template, "parameters": {}}}
        self.resources.deployments.begin_create_or_update(group, name, wish).result()

    def delete_group(self, name: str, wait: bool = True) -> None:
        from azure.core.exceptions import ResourceNotFoundError

        with contextlib.suppress(ResourceNotFoundError):
            started = self.resources.resource_groups.begin_delete(name)
            if wait:
                started.result()

    def left(self, group: str) -> list[str]:
        """Return what a group still holds, as `type name`; nothing where the group is gone."""
        from azure.core.exceptions import ResourceNotFoundError

        try:
            return [f"{one.type} {one.name}" for one in self.resources.resources.list_by_resource_group(group)]
        except ResourceNotFoundError:
            return []

    def principal(self, identity: str) -> str:
        """Return the id by which roles are given to a managed identity, which is named by its resource id."""
        found = self.resources.resources.get_by_id(identity, "2023-01-31")
        return str(found.properties["principalId"])

    def machines(self, group: str) -> list[dict[str, Any]]:
        """Return the VMs of a group: name, size, kind ("head" or that of its nodes), spot, state (of its power)."""
        from azure.core.exceptions import ResourceNotFoundError

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
        except ResourceNotFoundError:  # the group, or a VM that went meanwhile
            pass
        return found

    def head_address(self, group: str) -> str | None:
        """Return the public address of the head: that of its interface, as an interrupted launch leaves others."""
        heads = [vm for vm in self.compute.virtual_machines.list(group) if (vm.tags or {}).get(KIND_TAG) == "head"]
        for vm in heads:
            interface = vm.network_profile.network_interfaces[0].id.rpartition("/")[2]
            for place in self.network.network_interfaces.get(group, interface).ip_configurations:
                if place.public_ip_address:
                    name = place.public_ip_address.id.rpartition("/")[2]
                    return str(self.network.public_ip_addresses.get(group, name).ip_address or "") or None
        return None
