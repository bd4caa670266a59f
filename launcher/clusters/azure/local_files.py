"""Files and facts of this machine that a cluster of Azure VMs needs: SSH key, public address, launch's own code."""

from __future__ import annotations

import subprocess
import urllib.request
from importlib.metadata import version
from pathlib import Path

from launcher.clusters.azure.ray_yaml import CODE
from launcher.clusters.remote import project, registry
from launcher.clusters.remote.bootstrap import Environment
from launcher.errors import ClusterError, ConfigError

ADDRESS_SERVICE = "https://api.ipify.org"  # responds with the public address of the client
KINDS = ("yaml", "key", "key.pub", "hosts", "log", "failures", "requirements.txt", "constraints.txt")
AZURE_PACKAGES = (
    "azure-common",
    "azure-core",
    "azure-identity",
    "azure-mgmt-compute",
    "azure-mgmt-network",
    "azure-mgmt-resource",
    "msrest",
    "msrestazure",
)


def file_of(name: str, kind: str) -> Path:
    """Return the path of a file of a cluster, next to the cluster's record. kind: one of `KINDS`."""
    directory = registry.directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / f"{name}.{kind}"


def key_of(name: str) -> Path:
    """Return the path of the cluster's private SSH key, which is created if it does not exist.

    Raises:
        ClusterError: ssh-keygen failed.
    """
    file = file_of(name, "key")
    if not file.exists():
        words = ["ssh-keygen", "-q", "-t", "rsa", "-b", "3072", "-N", "", "-C", f"launch-{name}", "-f", str(file)]
        try:
            subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ClusterError(
                f"ssh-keygen could not create a key for the cluster {name}: {error}. Install the OpenSSH client."
            ) from None
    return file


def own_address() -> str:
    """Return the public IP address of this machine. Raises ConfigError if the address service does not answer."""
    try:
        with urllib.request.urlopen(ADDRESS_SERVICE, timeout=10) as answer:
            return str(answer.read(64).decode()).strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"SSH access to the cluster is limited to the address of this machine, but {ADDRESS_SERVICE} did not "
            f"return it ({error}). Set it yourself, for example cluster.ssh_from=203.0.113.7/32."
        ) from None


def files(name: str) -> dict[str, str]:
    """Return the files that are copied to every VM: launch and its requirements. Path on the VM -> local path."""
    environment = Environment.own()
    found = {f"{CODE}/{part}": str(project.HOME / part) for part in project.OWN}
    for kind, text in (("requirements", environment.requirements), ("constraints", environment.constraints)):
        file = file_of(name, f"{kind}.txt")
        file.write_text(text)
        found[f"{CODE}/{kind}.txt"] = str(file)
    return found


def pins() -> list[str]:
    """Return the packages with which the head creates nodes, pinned to the versions installed on this machine."""
    return [f"{name}=={version(name)}" for name in AZURE_PACKAGES]
