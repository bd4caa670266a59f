"""The base of a cluster, deployed before its VMs: identities, network, and who may reach the head.

Ray's own template opens SSH to the whole world and gives every worker the right to change everything in the group.
Here one address may reach SSH, the head's identity may create VMs in this group, and the nodes' identity has no right
in it at all; storage is granted to it by its owner (`mounts.role_lines`).
"""

from __future__ import annotations

from typing import Any

from launcher.clusters.azure.kind import ANYWHERE
from launcher.clusters.azure.spec import ClusterSpec

DEPLOYMENT = "launch-base"
CONTRIBUTOR = "b24988ac-6180-42a0-ab88-20f7382dd24c"  # built-in roles of Azure
BLOB_DATA_CONTRIBUTOR = "ba92f5b4-2d11-453d-a403-e96b0029c9fe"
ADDRESSES = "10.77.0.0/16"
ROLE_API = "2022-04-01"
_NETWORK_API = "2024-10-01"
_SCHEMA = "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#"


def ids(subscription: str, wanted: ClusterSpec) -> dict[str, str]:
    """Return the resource ids that VMs refer to: head (identity), nodes (identity), nsg, subnet."""
    group = f"/subscriptions/{subscription}/resourceGroups/{wanted.group}/providers"
    name = wanted.name
    return {
        "head": f"{group}/Microsoft.ManagedIdentity/userAssignedIdentities/{name}-head",
        "nodes": f"{group}/Microsoft.ManagedIdentity/userAssignedIdentities/{name}-nodes",
        "nsg": f"{group}/Microsoft.Network/networkSecurityGroups/{name}-nsg",
        "subnet": f"{group}/Microsoft.Network/virtualNetworks/{name}-vnet/subnets/{name}-subnet",
    }


def template(wanted: ClusterSpec) -> dict[str, Any]:
    """Return the ARM template, for a deployment into the cluster's group. No parameters: all is written in it."""
    name = wanted.name
    head = f"resourceId('Microsoft.ManagedIdentity/userAssignedIdentities', '{name}-head')"
    role = "Microsoft.Authorization"
    nsg = f"resourceId('Microsoft.Network/networkSecurityGroups', '{name}-nsg')"
    subnet = {
        "addressPrefix": ADDRESSES,
        "networkSecurityGroup": {"id": f"[{nsg}]"},
        # New networks have none unless it is asked for, and nodes have no public address: packages come this way.
        "defaultOutboundAccess": True,
        "serviceEndpoints": [{"service": "Microsoft.Storage"}],
    }
    ssh = {
        "priority": 1000,
        "protocol": "Tcp",
        "access": "Allow",
        "direction": "Inbound",
        "sourceAddressPrefix": "0.0.0.0/0" if wanted.ssh_from == ANYWHERE else wanted.ssh_from,
        "sourcePortRange": "*",
        "destinationAddressPrefix": "*",
        "destinationPortRange": "22",
    }
    resources = [
        _resource("Microsoft.ManagedIdentity/userAssignedIdentities", "2023-01-31", f"{name}-head", wanted),
        _resource("Microsoft.ManagedIdentity/userAssignedIdentities", "2023-01-31", f"{name}-nodes", wanted),
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
            **_resource("Microsoft.Network/networkSecurityGroups", _NETWORK_API, f"{name}-nsg", wanted),
            "properties": {"securityRules": [{"name": "SSH", "properties": ssh}]},
        },
        {
            **_resource("Microsoft.Network/virtualNetworks", _NETWORK_API, f"{name}-vnet", wanted),
            "dependsOn": [f"[{nsg}]"],
            "properties": {
                "addressSpace": {"addressPrefixes": [ADDRESSES]},
                "subnets": [{"name": f"{name}-subnet", "properties": subnet}],
            },
        },
    ]
    return {"$schema": _SCHEMA, "contentVersion": "1.0.0.0", "resources": resources}


def _resource(kind: str, api: str, name: str, wanted: ClusterSpec) -> dict[str, Any]:
    return {
        "type": kind,
        "apiVersion": api,
        "name": name,
        "location": wanted.nodes.region,
        "tags": wanted.tags,
    }
