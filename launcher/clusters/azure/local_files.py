"""What a cluster of Azure VMs takes from this machine: its key, its address, its files."""

from __future__ import annotations

import subprocess
import urllib.request
from pathlib import Path

from launcher.clusters.azure.ray_yaml import CODE
from launcher.clusters.remote import project, registry
from launcher.clusters.remote.bootstrap import Environment
from launcher.errors import ClusterError, ConfigError

WHO_AM_I = "https://api.ipify.org"  # answers with the address that it sees
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
    """Return a file that belongs to a cluster, beside what is written down of it; see `KINDS`."""
    place = registry.directory()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place / f"{name}.{kind}"


def key_of(name: str) -> Path:
    """Return the file of the cluster's private SSH key; made for it, and gone with it."""
    file = file_of(name, "key")
    if not file.exists():
        words = ["ssh-keygen", "-q", "-t", "rsa", "-b", "3072", "-N", "", "-C", f"launch-{name}", "-f", str(file)]
        try:
            subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ClusterError(
                f"ssh-keygen could not make a key for {name}: {error}. Install OpenSSH's client."
            ) from None
    return file


def own_address() -> str:
    try:
        with urllib.request.urlopen(WHO_AM_I, timeout=10) as answer:
            return str(answer.read(64).decode()).strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Only this machine's address is to reach the cluster, and {WHO_AM_I} does not tell it ({error}). Give it: "
            "cluster.ssh_from=203.0.113.7/32."
        ) from None


def files(name: str) -> dict[str, str]:
    """Return what every VM gets: launch itself, and what its environment is made from. Path there -> path here."""
    environment = Environment.own()
    found = {f"{CODE}/{part}": str(project.HOME / part) for part in project.OWN}
    for kind, text in (("requirements", environment.requirements), ("constraints", environment.constraints)):
        file = file_of(name, f"{kind}.txt")
        file.write_text(text)
        found[f"{CODE}/{kind}.txt"] = str(file)
    return found


def pins() -> list[str]:
    """Return the packages that the head needs to make nodes, in the versions that are installed here."""
    from importlib.metadata import version

    return [f"{name}=={version(name)}" for name in AZURE_PACKAGES]
