"""The watchdog with a real Ray cluster: a busy node is not deleted. Takes seconds; run with `make slow`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.jobs.remote import jobs_cluster
from tests.support.vmlab.lab import ROOT

pytestmark = pytest.mark.slow
CODE = """
import os, time, ray
from launcher.clusters.azure import on_head

on_head.ADDRESS = ray.init(address=os.environ["HERE"], logging_level="error").address_info["gcs_address"]
own = ray.nodes()[0]["NodeManagerAddress"]

@ray.remote(num_cpus=1)
class Work:
    def started(self):
        return True

work = Work.remote()
ray.get(work.started.remote())
assert on_head._drain_idle([own, "10.9.9.9"]) == {own}, "a busy node was drained"
assert on_head._drain_idle(["10.9.9.9"]) == set(), "a node that never joined is not busy"
ray.kill(work)
latest = time.monotonic() + 240
while on_head._drain_idle([own]):
    assert time.monotonic() < latest, "an idle node is not drained"
    time.sleep(0.5)
print("drained", flush=True)
os._exit(0)
"""


def test_a_busy_node_is_kept_and_an_idle_one_is_drained() -> None:
    with jobs_cluster.running() as cluster:
        words = cluster.process.args
        assert isinstance(words, list)
        port = next(str(word).partition("=")[2] for word in words if str(word).startswith("--port="))
        environment = {**cluster.environment(), "HERE": f"127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", CODE], env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
        )
    assert "drained" in done.stdout, done.stdout + done.stderr
