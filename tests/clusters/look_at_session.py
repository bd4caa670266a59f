"""A driver that starts an embedded Ray, inspects it, and prints the facts as a dict."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import ray

from launcher.clusters import reaper
from launcher.clusters.local.embedded_ray import LOOPBACK, EmbeddedRay
from tests.support.sockets import listeners

STRANGER = "import sys; from ray._raylet import GcsClient; GcsClient(sys.argv[1]).internal_kv_keys(b''); print('in')"


def visit(address: str, token: str) -> str:
    """Read the keys of the embedded Ray from another process with `token`; return "in" or the error."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    program = [sys.executable, "-c", STRANGER, address]
    visitor = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    return visitor.stdout.strip() or visitor.stderr.strip().splitlines()[-1]


def main() -> None:
    before = dict(os.environ)
    found: dict[str, object] = {}
    with EmbeddedRay(2, 0) as cluster:
        found["environment"] = sorted(set(os.environ.items()) ^ set(before.items()))
        found["answer"] = ray.get(ray.remote(lambda: 42).remote())
        ours = reaper.marked(cluster.marker)
        found["processes"] = [Path(f"/proc/{pid}/cmdline").read_bytes()[:60] for pid in ours]
        seen = listeners({*ours, os.getpid()})
        found["open_to_the_network"] = [f"{one.address}:{one.port}" for one in seen if not one.is_loopback]
        found["longest_socket"] = max(len(str(path)) for path in cluster.directory.rglob("sockets/*"))
        address = f"{LOOPBACK}:{ray.get_runtime_context().gcs_address.rpartition(':')[2]}"
        token = ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"]).remote())
        found["with_token"], found["without_token"] = visit(address, token), visit(address, "0" * 64)
        begun = time.monotonic()
    found["seconds_to_stop"] = time.monotonic() - begun
    found["left"] = list(reaper.marked(cluster.marker))
    found["directory_left"] = cluster.directory.exists()
    print(found)


main()
