"""`cluster.mounts`: containers of Azure Blob storage, mounted read-only on every node and cached on its local disk.

The module generates text: the configuration of blobfuse2 and the shell lines that use it on VMs. Pods get volumes
instead (`launcher.clusters.kuberay.manifest`). The managed identity of the node has access to the storage; no file
contains a key.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from launcher.errors import ConfigError

CLAIM = "claim://"
READER = "Storage Blob Data Reader"
_CACHE = "/var/cache/launch-blobfuse"  # a link to a directory on the local disk
_SETTINGS = "/etc/launch-mounts"
_OURS = ("bin", "boot", "dev", "etc", "home", "lib", "opt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var")


@dataclass(frozen=True)
class Mount:
    """A directory that is mounted on the nodes.

    Attributes:
        path: the mount point.
        account, container, below: Blob storage account, its container, and a directory in it; empty for a claim.
        claim: name of a PersistentVolumeClaim, which is mounted writable; None for Blob storage.
    """

    path: str
    account: str = ""
    container: str = ""
    below: str = ""
    claim: str | None = None

    @property
    def slug(self) -> str:
        """The path as a part of a name: `data-images` for `/data/images`."""
        return re.sub(r"[^a-z0-9]+", "-", self.path.lower()).strip("-")


def read(mounts: Mapping[str, Any]) -> list[Mount]:
    """Parse the key `cluster.mounts`.

    Raises:
        ConfigError: a path or a source is invalid; the message names it.
    """
    found = [_read(str(path), str(source)) for path, source in mounts.items()]
    paths = [mount.path for mount in found]
    for path in paths:
        inside = [other for other in paths if other != path and f"{path}/".startswith(f"{other}/")]
        if inside or paths.count(path) > 1:
            raise ConfigError(
                f"cluster.mounts: {path} is inside {(inside or [path])[0]}, which is mounted as well. Use paths that "
                "do not contain each other.",
                key="cluster.mounts",
            )
    by_slug: dict[str, Mount] = {}
    for mount in found:
        other = by_slug.setdefault(mount.slug, mount)
        if other is not mount:
            raise ConfigError(
                f"cluster.mounts: {mount.path} differs from {other.path} only in punctuation. Rename one of them.",
                key="cluster.mounts",
            )
    return found


def _read(path: str, source: str) -> Mount:
    if not re.fullmatch(r"(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+", path) or path[1:] in _OURS:
        raise ConfigError(
            f"cluster.mounts: {path!r} is not a valid mount point. Use an absolute path without spaces that the system "
            "does not use, such as /data.",
            key="cluster.mounts",
        )
    if source.startswith(CLAIM):
        name = source.removeprefix(CLAIM)
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
            raise ConfigError(
                f"cluster.mounts: {path} is {source!r}. Write {CLAIM} and the name of a volume claim.",
                key="cluster.mounts",
            )
        return Mount(path, claim=name)
    parts = urlsplit(source)
    account = (parts.hostname or "").removesuffix(".dfs.core.windows.net")
    container, below = parts.username or "", parts.path.strip("/")
    fine = (
        parts.scheme == "abfss"
        and "?" not in source
        and "#" not in source
        and f"{container}@{account}.dfs.core.windows.net" == parts.netloc
        and re.fullmatch(r"[a-z0-9]{3,24}", account)
        and re.fullmatch(r"[a-z0-9](-?[a-z0-9]){2,62}", container)
        and re.fullmatch(r"[A-Za-z0-9_./=+-]*", below)
        and ".." not in below.split("/")
    )
    if not fine:
        # The text after a question mark may be a signature that gives access to the storage: it is not shown.
        raise ConfigError(
            f"cluster.mounts: {path} is {source.partition('?')[0]!r}{' and more' * ('?' in source)}, but must be "
            "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH, without a key or a signature: the managed identity "
            f"of the nodes has access (role Storage Blob Data Reader). Pods can also use a volume claim: {CLAIM}NAME.",
            key="cluster.mounts",
        )
    return Mount(path, account, container, below)


def role_lines(mounts: Sequence[Mount], principals: Mapping[str, str]) -> list[str]:
    """Return the `az` commands that give managed identities read access to each mounted container.

    launch does not create these role assignments with the cluster: they belong to the storage, which is in another
    resource group of the user.

    Args:
        principals: name of an identity -> id of its principal.
    """
    containers = sorted({(mount.account, mount.container) for mount in mounts if mount.claim is None})
    return [
        f"az role assignment create --assignee-object-id {principal} --assignee-principal-type ServicePrincipal "
        f"--role '{READER}' --scope \"$(az storage account show --name {account} --query id --output tsv)"
        f'/blobServices/default/containers/{container}"'
        for account, container in containers
        for _, principal in sorted(principals.items())
    ]


def blobfuse(mount: Mount, client_id: str | None = None) -> str:
    """Return the configuration of blobfuse2 for one mount.

    `setup/baseConfig.yaml` of Azure/azure-storage-fuse describes the keys.

    Args:
        client_id: of the managed identity, if the node has several.
    """
    import yaml

    storage: dict[str, Any] = {
        "type": "adls",
        "account-name": mount.account,
        "endpoint": f"https://{mount.account}.dfs.core.windows.net",
        "container": mount.container,
        "mode": "msi",
    }
    if client_id:
        storage["appid"] = client_id
    if mount.below:
        storage["subdirectory"] = mount.below
    year = 365 * 24 * 3600  # files stay in the cache for the next epoch, until the disk is 80 % full
    return yaml.safe_dump(
        {
            "read-only": True,
            "allow-other": True,
            "logging": {"type": "syslog", "level": "log_warning"},
            "components": ["libfuse", "file_cache", "attr_cache", "azstorage"],
            "libfuse": {"attribute-expiration-sec": 7200, "entry-expiration-sec": 7200},
            "file_cache": {"path": f"{_CACHE}/{mount.slug}", "timeout-sec": year},
            "attr_cache": {"timeout-sec": 7200},
            "azstorage": storage,
        },
        sort_keys=False,
    )


def setup_lines(mounts: Sequence[Mount], client_id: str | None = None) -> list[str]:
    """Return the shell lines that mount all containers on a VM with Ubuntu, for a user who may use sudo.

    The lines are idempotent. The cache is on the first unused local NVMe disk, which is formatted (temporary disks of
    Azure are blank), else on the temporary disk, else on the system disk.

    Raises:
        ConfigError: a mount is a volume claim of Kubernetes.
    """
    claims = [mount for mount in mounts if mount.claim is not None]
    if claims:
        raise ConfigError(
            f"cluster.mounts: {claims[0].path} is {CLAIM}{claims[0].claim}, a volume claim of Kubernetes, and these "
            "nodes are VMs. Name a container: abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH.",
            key="cluster.mounts",
        )
    if not mounts:
        return []
    lines = [_INSTALL, _DISK, f"sudo mkdir -p {_SETTINGS}"]
    for mount in mounts:
        file = f"{_SETTINGS}/{mount.slug}.yaml"
        lines.append(f"printf %s {shlex.quote(blobfuse(mount, client_id))} | sudo tee {file} > /dev/null")
        lines.append(
            f"mountpoint -q {mount.path} || {{ sudo mkdir -p {mount.path} {_CACHE}/{mount.slug} && "
            f"sudo blobfuse2 mount {mount.path} --config-file={file}; }}"
        )
    return lines


# Azure's images for HPC and data science have Microsoft's package archive; on other images it is added.
_INSTALL = (
    "command -v blobfuse2 > /dev/null || { { apt-cache show blobfuse2 > /dev/null 2>&1 || "
    # In a private directory: root must not install a file that another user created in /tmp.
    '{ place=$(mktemp -d) && curl -fsSLo "$place/microsoft.deb" "https://packages.microsoft.com/config/ubuntu/'
    '$(. /etc/os-release; echo $VERSION_ID)/packages-microsoft-prod.deb" && sudo dpkg -i "$place/microsoft.deb" && '
    'rm -rf "$place"; }; } && '
    "sudo apt-get update -qq && sudo apt-get install -y -qq blobfuse2 fuse3; }"
)
_DISK = f"""if [ ! -e {_CACHE} ]; then
  place=/mnt
  for disk in $(lsblk -dnpo NAME | grep nvme); do
    # lsblk prints one word for a disk without partitions, file system and mount point.
    [ "$(lsblk -npo NAME,FSTYPE,MOUNTPOINT "$disk" | wc -w)" = 1 ] || continue
    sudo mkfs.ext4 -q "$disk" && sudo mkdir -p /mnt/launch-nvme && sudo mount "$disk" /mnt/launch-nvme || continue
    place=/mnt/launch-nvme
    break
  done
  sudo mkdir -p "$place/launch-blobfuse" && sudo ln -sfn "$place/launch-blobfuse" {_CACHE}
fi"""
