"""A fake of Azure's management API, for the requests of Ray's unmodified Azure provider, Azure's SDK and launch.

    with Fake(directory) as azure:
        subprocess.run(["launch", "up", …], env={**os.environ, **azure.environment})
        assert azure.remaining("launch-demo") == []

Clients connect to it as to Azure: `HTTPS_PROXY` is a proxy that answers for management.azure.com itself, with a
certificate of a test CA (`REQUESTS_CA_BUNDLE`), and a fake `az` returns the token. `bicep-cost` evaluates the ARM
templates, so that a deployment creates the resources of its template. Not modelled: changing quotas, capacity, times,
and most of Azure's validation.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.azure.proxy import HOST, Refusal, certificates, handler
from tests.support.servers import HttpServer

SUBSCRIPTION = "00000000-1111-2222-3333-444444444444"
TENANT = "99999999-1111-2222-3333-444444444444"
VM, NIC, ADDRESS, DISK = (
    "microsoft.compute/virtualmachines",
    "microsoft.network/networkinterfaces",
    "microsoft.network/publicipaddresses",
    "microsoft.compute/disks",
)
AZ = """#!{python}
import json, pathlib, sys, time
error = pathlib.Path({state!r})
if error.exists():
    sys.exit(error.read_text())
words = sys.argv[1:]
if words[:2] == ["account", "show"]:
    print(json.dumps({{"id": {subscription!r}, "name": "fake", "tenantId": {tenant!r}, "state": "Enabled"}}))
elif words[:2] == ["account", "get-access-token"]:
    until = time.time() + 3600
    print(json.dumps({{"accessToken": {token!r}, "expires_on": int(until), "tokenType": "Bearer",
        "expiresOn": time.strftime("%Y-%m-%d %H:%M:%S.000000", time.localtime(until)),
        "subscription": {subscription!r}, "tenant": {tenant!r}}}))
elif words[:1] == ["version"] or words[:1] == ["--version"]:
    print("azure-cli 2.80.0")
else:
    sys.exit(f"az: {{words}} is not supported by the fake")
"""


@dataclass
class Operation:
    """A long operation: the time at which it ends, and the error with which it fails."""

    at: float
    refusal: Refusal | None = None


@dataclass
class Fake:
    """The API. A test changes its behaviour by setting its attributes.

    Attributes:
        seconds: the duration of every long operation.
        usages: quota -> (limit, used), for every region.
        sizes: offered size -> zones.
        blocked: size that is not available to the subscription -> reason.
        refuse: (VM size, spot) -> (code, message) with which deployments of such VMs fail.
        throttle: the number of requests that are answered with status 429.
        vm_created, vm_deleted: called with the resource of a VM. `vm_created` may set its address.
        simulated: called with the name of a spot VM whose eviction is simulated; None: the VM is evicted immediately.
    """

    directory: Path
    listen: str = "127.0.0.1"
    seconds: float = 0.0
    usages: dict[str, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[str, list[str]] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    refuse: dict[tuple[str, bool], tuple[str, str]] = field(default_factory=dict)
    throttle: int = 0
    vm_created: Callable[[dict[str, Any]], None] = lambda vm: None
    vm_deleted: Callable[[dict[str, Any]], None] = lambda vm: None
    simulated: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.resources: dict[str, dict[str, Any]] = {}  # by id, in small letters
        self.groups: dict[str, dict[str, Any]] = {}
        self.deployments: dict[str, dict[str, Any]] = {}
        self.operations: dict[str, Operation] = {}
        self.requests: list[str] = []
        self.token = uuid.uuid4().hex  # of the user
        self.identities: dict[str, str] = {}  # of VMs: token -> name
        self._lock = threading.RLock()
        self._numbers = itertools.count(4)
        self.server: Callable[[Any], HttpServer] = lambda handler: HttpServer((self.listen, 0), handler)

    def __enter__(self) -> Fake:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._context = certificates(self.directory)
        self._az = self.directory / "bin" / "az"
        self._az.parent.mkdir(exist_ok=True)
        self._az_error = self.directory / "az-error"
        self._az.write_text(
            AZ.format(
                python=sys.executable,
                state=str(self._az_error),
                subscription=SUBSCRIPTION,
                tenant=TENANT,
                token=self.token,
            )
        )
        self._az.chmod(self._az.stat().st_mode | stat.S_IXUSR)
        self._server = self.server(handler(self.answer, self._context))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables for clients."""
        proxy = f"http://{self.listen}:{self._server.server_address[1]}"
        return {
            "PATH": f"{self._az.parent}{os.pathsep}{os.environ['PATH']}",
            "HTTPS_PROXY": proxy,
            "https_proxy": proxy,
            "NO_PROXY": "127.0.0.1,localhost,169.254.169.254",
            "no_proxy": "127.0.0.1,localhost,169.254.169.254",
            "REQUESTS_CA_BUNDLE": str(self.directory / "ca.pem"),
        }

    def fail_az(self, text: str | None) -> None:
        """Make `az` fail with this error; None: make it succeed again."""
        if text is None:
            self._az_error.unlink(missing_ok=True)
        else:
            self._az_error.write_text(text)

    def remaining(self, group: str) -> list[str]:
        """Return the ids of all resources of a group, and the group itself."""
        inside = f"/resourcegroups/{group.lower()}/"
        own = [group] if group.lower() in self.groups else []
        return own + sorted(key for key in self.resources if inside in key)

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [one for key, one in sorted(self.resources.items()) if f"/providers/{kind}/" in key and _is(key, kind)]

    def evict(self, name: str) -> None:
        """Evict a spot VM as Azure does: VM and disk are deleted, network interface and address remain."""
        with self._lock:
            key = next(key for key in self.resources if key.endswith(f"{VM}/{name.lower()}"))
            vm = self.resources.pop(key)
            self.resources.pop(vm["properties"]["storageProfile"]["osDisk"]["managedDisk"]["id"].lower(), None)
        self.vm_deleted(vm)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, body: Any, headers: Any) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON body and headers of one request. Raises Refusal."""
        address = urlsplit(target)
        path = unquote(address.path).rstrip("/")
        with self._lock:
            self.requests.append(f"{method} {path}")
            if self.throttle > 0:
                self.throttle -= 1
                raise Refusal(429, "TooManyRequests", "The request is being throttled.", {"Retry-After": "1"})
        self._authorize(path, (headers.get("Authorization") or "").removeprefix("Bearer "))
        for pattern, serve in (
            (r"/operations/([^/]+)", self._operation),
            (r"/subscriptions/[^/]+/resourcegroups/([^/]+)", self._group),
            (r"/subscriptions/[^/]+/resourcegroups/([^/]+)/resources", self._list_resources),
            (r"/subscriptions/[^/]+/providers/Microsoft\.Compute/locations/([^/]+)/usages", self._usages),
            (r"/subscriptions/[^/]+/providers/Microsoft\.Compute/(skus)", self._skus),
            (r"(.*/providers/Microsoft\.Resources/deployments/[^/]+)", self._deployment),
            (r"(.*)/instanceView", self._view),
            (r"(.*)/simulateEviction", self._simulate_eviction),
            (r"(.*/providers/[^/]+/(?:virtualMachines|networkInterfaces|publicIPAddresses|disks))", self._list),
            (r"(/subscriptions/.*/providers/.*)", self._resource),
        ):
            match = re.fullmatch(pattern, path, re.IGNORECASE)
            if match:
                return serve(method, match[1], body, parse_qs(address.query))
        raise Refusal(404, "NotFound", f"The fake does not support {method} {path}")

    def token_of(self, vm: dict[str, Any]) -> str:
        """Return the access token that the metadata service of a VM returns for its identity."""
        (identity,) = vm["identity"]["userAssignedIdentities"]
        token = uuid.uuid4().hex
        self.identities[token] = identity.rpartition("/")[2]
        return token

    def _authorize(self, path: str, token: str) -> None:
        """Check the token: the user may do anything, the identity of a VM only what its roles on the group allow."""
        if token == self.token:
            return
        identity = self.identities.get(token)
        if identity is None:
            raise Refusal(401, "ExpiredAuthenticationToken", "The access token expiry UTC time is earlier than now.")
        roles = self.of_type("microsoft.authorization/roleassignments")
        scopes = [
            role["id"].lower().partition("/providers/")[0] for role in roles if identity in role["properties"]["of"]
        ]
        if not path.startswith("/operations/") and not any(path.lower().startswith(scope) for scope in scopes):
            message = f"The client '{identity}' does not have authorization to perform action over scope '{path}'."
            raise Refusal(403, "AuthorizationFailed", message)

    def _operation(self, method: str, name: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        operation = self.operations[name]
        if time.monotonic() < operation.at:
            return 202, {"status": "InProgress"}, self._poll(name)
        if operation.refusal:
            return 200, {"status": "Failed", **operation.refusal.body()}, {}
        return 200, {"status": "Succeeded"}, {}

    def _later(self, refusal: Refusal | None = None, then: Callable[[], None] | None = None) -> dict[str, str]:
        """Start a long operation, and return the headers with its URL. then: called at its end."""
        name = uuid.uuid4().hex
        self.operations[name] = Operation(time.monotonic() + self.seconds, refusal)
        if then:
            threading.Timer(self.seconds, then).start() if self.seconds else then()
        return self._poll(name)

    def _poll(self, name: str) -> dict[str, str]:
        place = f"https://{HOST}/operations/{name}"
        return {"Azure-AsyncOperation": place, "Location": place, "Retry-After": "1"}

    def _group(self, method: str, name: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        key = name.lower()
        if method == "PUT":
            group = {"id": f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{name}", "name": name, **body}
            group["properties"] = {"provisioningState": "Succeeded"}
            self.groups[key] = group
            return 201, group, {}
        if key not in self.groups:
            raise Refusal(404, "ResourceGroupNotFound", f"Resource group '{name}' could not be found.")
        if method == "HEAD":
            return 204, None, {}
        if method == "DELETE":
            return (
                202,
                None,
                {"Location": self._later(then=lambda: self._drop_group(key))["Location"], "Retry-After": "1"},
            )
        return 200, self.groups[key], {}

    def _drop_group(self, key: str) -> None:
        with self._lock:
            inside = f"/resourcegroups/{key}/"
            deleted = [self.resources.pop(one) for one in list(self.resources) if inside in one]
            self.groups.pop(key, None)
        for one in deleted:
            if _is(one["id"].lower(), VM):
                self.vm_deleted(one)

    def _in_group(self, group: str) -> list[dict[str, Any]]:
        if group.lower() not in self.groups:
            raise Refusal(404, "ResourceGroupNotFound", f"Resource group '{group}' could not be found.")
        inside = f"/resourcegroups/{group.lower()}/"
        return [one for key, one in sorted(self.resources.items()) if inside in key]

    def _list_resources(self, method: str, group: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        return 200, {"value": self._in_group(group)}, {}

    def _list(self, method: str, path: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        group = re.search(r"/resourcegroups/([^/]+)", path, re.IGNORECASE)
        assert group
        kind = path.partition("/providers/")[2].lower()
        return 200, {"value": [one for one in self._in_group(group[1]) if _is(one["id"].lower(), kind)]}, {}

    def _usages(self, method: str, region: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        listed = [
            {"unit": "Count", "limit": limit, "currentValue": used, "name": {"value": name, "localizedValue": name}}
            for name, (limit, used) in self.usages.items()
        ]
        return 200, {"value": listed}, {}

    def _skus(self, method: str, what: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        asked = re.search(r"location eq '(\w+)'", (query.get("$filter") or [""])[0])
        region = asked[1] if asked else "eastus"
        listed = []
        for name, zones in self.sizes.items():
            limits = (
                [{"type": "Location", "values": [region], "reasonCode": self.blocked[name]}]
                if name in self.blocked
                else []
            )
            where = [{"location": region, "zones": zones}]
            listed.append(
                {"resourceType": "virtualMachines", "name": name, "locationInfo": where, "restrictions": limits}
            )
        return 200, {"value": listed}, {}

    def _view(self, method: str, path: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        self._found(path)
        states = ("ProvisioningState/succeeded", "PowerState/running")
        return 200, {"statuses": [{"code": state} for state in states]}, {}

    def _simulate_eviction(self, method: str, path: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        vm = self._found(path)
        if vm["properties"].get("priority") != "Spot":
            raise Refusal(409, "OperationNotAllowed", "Eviction can be simulated for spot virtual machines alone.")
        (self.simulated or self.evict)(vm["name"])
        return 204, None, {}

    def _found(self, path: str) -> dict[str, Any]:
        if path.lower() not in self.resources:
            raise Refusal(404, "ResourceNotFound", f"The Resource '{path}' was not found.")
        return self.resources[path.lower()]

    def _resource(self, method: str, path: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        key = path.lower()
        if method == "PUT":
            self.resources[key] = {"id": path, "name": path.rpartition("/")[2], **body}
            return 201, self.resources[key], {}
        if method == "DELETE" and key not in self.resources:
            return 204, None, {}
        found = self._found(path)
        if method == "PATCH":
            found.update(body)
            return 200, found, {}
        if method == "DELETE":
            del self.resources[key]
            if _is(key, VM):
                self.vm_deleted(found)
            return 202, None, {"Location": self._later()["Location"], "Retry-After": "1"}
        return 200, found, {}

    def _deployment(self, method: str, path: str, body: Any, query: Any) -> tuple[int, Any, dict[str, str]]:
        if method == "GET":
            return 200, self.deployments[path.lower()], {}
        match = re.search(r"/resourcegroups/([^/]+)/", path, re.IGNORECASE)
        assert match
        group = self.groups.get(match[1].lower())
        if group is None:
            raise Refusal(404, "ResourceGroupNotFound", f"Resource group '{match[1]}' could not be found.")
        made = self._expand(path, group, body["properties"])
        refusal = self._refusal(made)
        state = "Failed" if refusal else "Succeeded"
        deployment: dict[str, Any] = {
            "id": path,
            "name": path.rpartition("/")[2],
            "properties": {"provisioningState": state},
        }
        self.deployments[path.lower()] = deployment
        accepted = {**deployment, "properties": {"provisioningState": "Accepted"}}
        if refusal:
            deployment["properties"]["error"] = refusal.body()["error"]
            # Resources that do not depend on the VM were created before the failure.
            made = [one for one in made if not _is(one["id"].lower(), VM)]
        for one in made:
            self._create(one)
        return 201, accepted, self._later(refusal)

    def _expand(self, path: str, group: dict[str, Any], properties: dict[str, Any]) -> list[dict[str, Any]]:
        from bicep_cost.engine import DeploymentSettings, Engine

        name = path.rpartition("/")[2]
        engine = Engine(DeploymentSettings(SUBSCRIPTION, group["name"], group["location"], name))
        given = {key: entry["value"] for key, entry in (properties.get("parameters") or {}).items()}
        engine.expand(properties["template"], given)
        found = []
        for one in engine.resources:
            body = json.loads(json.dumps(one.body, default=lambda value: None))
            # Keys are not evaluated, and the identity of a VM is a key.
            identities = (body.get("identity") or {}).get("userAssignedIdentities")
            if identities:
                body["identity"]["userAssignedIdentities"] = {given["msi"]: {}}
            if one.type.lower() == "microsoft.authorization/roleassignments":
                # The principal id is known only after the identity was created, so record its name.
                raw = next(each for each in properties["template"]["resources"] if each["type"] == one.type)
                body["properties"]["of"] = re.findall(r"'([\w-]+)'\), ", raw["properties"]["principalId"])
            found.append({**body, "id": one.id, "name": one.name, "type": one.type})
        return found

    def _refusal(self, made: list[dict[str, Any]]) -> Refusal | None:
        for one in made:
            if _is(one["id"].lower(), VM):
                size = one["properties"]["hardwareProfile"]["vmSize"]
                why = self.refuse.get((size, one["properties"].get("priority") == "Spot"))
                if why:
                    inner = {"error": {"code": why[0], "message": why[1]}}
                    return Refusal(
                        409, "DeploymentFailed", f"At least one resource operation failed. {json.dumps(inner)}"
                    )
        return None

    def _create(self, one: dict[str, Any]) -> None:
        key = one["id"].lower()
        properties = one.setdefault("properties", {}) or {}
        properties["provisioningState"] = "Succeeded"
        one["properties"] = properties
        with self._lock:
            if _is(key, "microsoft.managedidentity/userassignedidentities"):
                properties["principalId"] = str(uuid.uuid5(uuid.NAMESPACE_URL, key))
            elif _is(key, ADDRESS):
                properties["ipAddress"] = f"198.51.100.{next(self._numbers)}"
            elif _is(key, NIC):
                inside = properties["ipConfigurations"][0]["properties"]
                inside["privateIPAddress"] = f"10.77.0.{next(self._numbers)}"
                if "publicIpAddress" in inside:  # the spelling of Azure's responses
                    inside["publicIPAddress"] = inside.pop("publicIpAddress")
            elif _is(key, VM):
                self._create_vm(one)
            self.resources[key] = one
        if _is(key, VM):
            self.vm_created(one)

    def _create_vm(self, vm: dict[str, Any]) -> None:
        disk = f"{vm['id'].rpartition('/')[0].rpartition('/')[0]}/disks/{vm['name']}_OsDisk_1"
        vm["properties"]["storageProfile"]["osDisk"] |= {"name": f"{vm['name']}_OsDisk_1", "managedDisk": {"id": disk}}
        vm["properties"]["vmId"] = str(uuid.uuid4())
        self.resources[disk.lower()] = {"id": disk, "name": f"{vm['name']}_OsDisk_1", "type": "Microsoft.Compute/disks"}


def nic_of(azure: Fake, vm: dict[str, Any]) -> dict[str, Any]:
    """Return the network interface of a VM."""
    return azure.resources[vm["properties"]["networkProfile"]["networkInterfaces"][0]["id"].lower()]


def _is(key: str, kind: str) -> bool:
    """Return whether a lowercase resource id ends with .../providers/KIND/NAME."""
    return key.rpartition("/")[0].endswith(f"/providers/{kind.lower()}")
