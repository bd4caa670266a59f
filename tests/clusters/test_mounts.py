"""`cluster.mounts`: validation, the configuration of blobfuse2 as golden text, idempotent shell lines."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.clusters.remote.mounts import Mount, blobfuse, read, setup_lines
from launcher.config import compose
from launcher.errors import ConfigError

IMAGENET = "abfss://sets@ada.dfs.core.windows.net/imagenet/2012"
GOLDEN = """\
read-only: true
allow-other: true
logging:
  type: syslog
  level: log_warning
components:
- libfuse
- file_cache
- attr_cache
- azstorage
libfuse:
  attribute-expiration-sec: 7200
  entry-expiration-sec: 7200
file_cache:
  path: /var/cache/launch-blobfuse/data
  timeout-sec: 31536000
attr_cache:
  timeout-sec: 7200
azstorage:
  type: adls
  account-name: ada
  endpoint: https://ada.dfs.core.windows.net
  container: sets
  mode: msi
  subdirectory: imagenet/2012
"""


def test_a_mount_is_read() -> None:
    assert read({"/data": IMAGENET, "/shared": "claim://my-claim"}) == [
        Mount("/data", "ada", "sets", "imagenet/2012"),
        Mount("/shared", claim="my-claim"),
    ]


@pytest.mark.parametrize(
    ("mounts", "message"),
    [
        ({"data": IMAGENET}, "'data' .* /data"),
        ({"/": IMAGENET}, "'/' .* /data"),
        ({"/etc": IMAGENET}, "'/etc' .* /data"),
        ({"/data; rm -rf x": IMAGENET}, "'/data; rm -rf x' .* /data"),
        ({"/a/../b": IMAGENET}, "'/a/../b' .* /data"),
        ({"/data": "/elsewhere"}, "abfss://CONTAINER@ACCOUNT"),
        ({"/data": "abfss://sets@ada.blob.core.windows.net/x"}, "abfss://CONTAINER@ACCOUNT"),
        ({"/data": "abfss://sets:key@ada.dfs.core.windows.net/x"}, "abfss://CONTAINER@ACCOUNT"),
        ({"/data": "abfss://sets@ada.dfs.core.windows.net/a/../b"}, "abfss://CONTAINER@ACCOUNT"),
        ({"/data": "abfss://sets@ada.dfs.core.windows.net/$(id)"}, "abfss://CONTAINER@ACCOUNT"),
        ({"/data": "claim://Not A Name"}, "claim://Not A Name"),
        ({"/data": IMAGENET, "/data/more": IMAGENET}, r"/data/more .*/data\b(?!/)"),
        ({"/a-b": IMAGENET, "/a_b": IMAGENET}, "/a_b .*/a-b "),
    ],
)
def test_an_invalid_mount_is_rejected(mounts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(mounts)
    assert caught.value.key == "cluster.mounts"


def test_a_signature_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match=re.escape(f"'{IMAGENET}'")) as caught:
        read({"/data": f"{IMAGENET}?sig=hunter2"})
    assert "hunter2" not in str(caught.value)


def test_the_configuration_is_the_golden_one() -> None:
    (mount,) = read({"/data": IMAGENET})
    assert blobfuse(mount) == GOLDEN
    assert yaml.safe_load(blobfuse(mount, "1234"))["azstorage"]["appid"] == "1234"


def test_volume_claims_are_rejected_on_vms() -> None:
    with pytest.raises(ConfigError, match=r"/shared .*claim://x"):
        setup_lines(read({"/shared": "claim://x"}))
    assert setup_lines([]) == []


def test_the_lines_mount_once(tmp_path: Path) -> None:
    """With stubs for the commands that need a real node, in a real shell."""
    for name, body in {
        "sudo": 'exec "$@"',
        "blobfuse2": f'echo "$@" >> {tmp_path}/mounted',
        "mountpoint": f"test -e {tmp_path}/mounted",
        "lsblk": 'case "$2" in NAME) echo /dev/nvme0n1; echo /dev/nvme1n1;; esac; '
        'case "$*" in *nvme0n1) echo /dev/nvme0n1 ext4 /;; *nvme1n1) echo /dev/nvme1n1;; esac',
        "mkfs.ext4": f'echo "$@" > {tmp_path}/formatted',
        "mount": f'echo "$@" > {tmp_path}/disk',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (mount,) = read({"/data": IMAGENET})
    script = "\n".join(setup_lines([mount]))
    for place in ("/var/cache", "/etc", "/mnt"):
        (tmp_path / "root" / place.strip("/")).mkdir(parents=True)
        script = script.replace(f" {place}/", f" {tmp_path}/root{place}/").replace(
            f"={place}/", f"={tmp_path}/root{place}/"
        )
    script = script.replace("mkdir -p /data", f"mkdir -p {tmp_path}/root/data")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        subprocess.run(["sh", "-euc", script], env=environment, check=True, timeout=240)
    assert (tmp_path / "formatted").read_text() == "-q /dev/nvme1n1\n", "the disk of the system is formatted"
    assert (tmp_path / "mounted").read_text().splitlines() == [
        f"mount /data --config-file={tmp_path}/root/etc/launch-mounts/data.yaml"
    ]
    assert (tmp_path / "root/var/cache/launch-blobfuse").resolve() == tmp_path / "root/mnt/launch-nvme/launch-blobfuse"
    assert (tmp_path / "root/etc/launch-mounts/data.yaml").read_text().startswith("read-only: true")


@pytest.mark.parametrize("kind", ["local", "none", "existing"])
def test_mounts_are_rejected_on_existing_machines(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"\b{kind}\b") as caught:
        compose([f"cluster={kind}", f"cluster.mounts={{/data: {IMAGENET}}}"])
    assert caught.value.key == "cluster.mounts"


def test_mounts_are_allowed_on_ssh_hosts() -> None:
    job = compose(["cluster=ssh", "cluster.hosts=[vm1]", f"cluster.mounts={{/data: {IMAGENET}}}"]).job
    assert read(job.cluster.mounts)[0].account == "ada"
