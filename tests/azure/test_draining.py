"""The watchdog on the head and a real Ray: a node that is at work is not taken away. Seconds: `make slow`."""

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
    def begun(self):
        return True

work = Work.remote()
ray.get(work.begun.remote())
assert on_head._drained_but([own, "10.9.9.9"]) == {own}, "a node at work was drained"
assert on_head._drained_but(["10.9.9.9"]) == set(), "one that never joined is at no work"
ray.kill(work)
latest = time.monotonic() + 30
while on_head._drained_but([own]):
    assert time.monotonic() < latest, "an idle node stays"
    time.sleep(0.5)
print("drained", flush=True)
os._exit(0)
"""


def test_a_node_at_work_stays_and_an_idle_one_goes() -> None:
    with jobs_cluster.running() as cluster:
        words = cluster.process.args
        assert isinstance(words, list)
        port = next(str(word).partition("=")[2] for word in words if str(word).startswith("--port="))
        environment = {**cluster.environment(), "HERE": f"127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", CODE], env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
        )
    assert "drained" in done.stdout, done.stdout + done.stderr
