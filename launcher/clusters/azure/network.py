"""The ARM template of a cluster's network and identities, which is deployed before its VMs.

Ray's own template opens SSH to every address and allows every worker to change all resources of the group. This
template allows SSH from one address only, the head's identity may create VMs in the group, and the nodes' identity has
no role in it. The owner of a storage account grants access to it (`mounts.role_lines`).
"""

from __future__ import annotations

from typing import Any

from launcher.clusters.azure.kind import ANYWHERE
from launcher.clusters.azure.spec import ClusterSpec

DEPLOYMENT = "launch-base"
CONTRIBUTOR = "b24988ac-6180-42a0-ab88-20f7382dd24c"  # built-in roles of Azure
ADDRESSES = "10.77.0.0/16"
ROLE_API = "2022-04-01"
_NETWORK_API = "2024-10-01"
_SCHEMA = "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#"


def ids(subscription: str, spec: ClusterSpec) -> dict[str, str]:
    """Return the resource ids that VMs reference, by name: head (identity), nodes (identity), nsg, subnet."""
    group = f"/subscriptions/{subscription}/resourceGroups/{spec.group}/providers"
    name = spec.name
    return {
        "head": f"{group}/Microsoft.ManagedIdentity/userAssignedIdentities/{name}-head",
        "nodes": f"{group}/Microsoft.ManagedIdentity/userAssignedIdentities/{name}-nodes",
        "nsg": f"{group}/Microsoft.Network/networkSecurityGroups/{name}-nsg",
        "subnet": f"{group}/Microsoft.Network/virtualNetworks/{name}-vnet/subnets/{name}-subnet",
    }


def template(spec: ClusterSpec) -> dict[str, Any]:
    """Return the ARM template for a deployment into the cluster's resource group. It has no parameters."""
    name = spec.name
    head = f"resourceId('Microsoft.ManagedIdentity/userAssignedIdentities', '{name}-head')"
    role = "Microsoft.Authorization"
    nsg = f"resourceId('Microsoft.Network/networkSecurityGroups', '{name}-nsg')"
    subnet = {
        "addressPrefix": ADDRESSES,
        "networkSecurityGroup": {"id": f"[{nsg}]"},
        # New networks have no outbound access by default, and nodes without a public address download packages.
        "defaultOutboundAccess": True,
        "serviceEndpoints": [{"service": "Microsoft.Storage"}],
    }
    ssh = {
        "priority": 1000,
        "protocol": "Tcp",
        "access": "Allow",
        "direction": "Inbound",
        "sourceAddressPrefix": "0.0.0.0/0" if spec.ssh_from == ANYWHERE else spec.ssh_from,
        "sourcePortRange": "*",
        "destinationAddressPrefix": "*",
        "destinationPortRange": "22",
    }
    resources = [
        _resource("Microsoft.ManagedIdentity/userAssignedIdentities", "2023-01-31", f"{name}-head", spec),
        _resource("Microsoft.ManagedIdentity/userAssignedIdentities", "2023-01-31", f"{name}-nodes", spec),
        {
            "type": "Microsoft.Authorization/roleAssignments",
            "apiVersion": ROLE_API,
            "name": f"[guid(resourceGroup().id, '{name}-head')]",
            "dependsOn": [f"[{head}]"],
            "properties": {
                "principalId": f"[reference({head}, '2023-01-31').principalId]",
                "roleDefinitionId": f"[subscriptionResourceId('{role}/roleDefinitions', '{CONTRIBUTOR}')]",
                "principalType": "ServicePrincipal",
                "description": f"The head of {name} creates and deletes VMs in this group.",
            },
        },
        {
            **_resource("Microsoft.Network/networkSecurityGroups", _NETWORK_API, f"{name}-nsg", spec),
            "properties": {"securityRules": [{"name": "SSH", "properties": ssh}]},
        },
        {
            **_resource("Microsoft.Network/virtualNetworks", _NETWORK_API, f"{name}-vnet", spec),
            "dependsOn": [f"[{nsg}]"],
            "properties": {
                "addressSpace": {"addressPrefixes": [ADDRESSES]},
                "subnets": [{"name": f"{name}-subnet", "properties": subnet}],
            },
        },
    ]
    return {"$schema": _SCHEMA, "contentVersion": "1.0.0.0", "resources": resources}


def _resource(kind: str, api: str, name: str, spec: ClusterSpec) -> dict[str, Any]:
    return {
        "type": kind,
        "apiVersion": api,
        "name": name,
        "location": spec.nodes.region,
        "tags": spec.tags,
    }
