"""A Ray on this machine for one command. It prints nothing, listens on loopback only, and ends with the command.

with EmbeddedRay(cpus=2, gpus=0) as cluster:
    ...  # ray.is_initialized(), cluster.directory is private scratch space
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import ray

from launcher.clusters import reaper
from launcher.clusters.capacity import resources
from launcher.clusters.local import ray_session
from launcher.clusters.ray_process import environment_set, preload, preserved_signal_handlers, private_directory
from launcher.ray_seam import private
from launcher.ray_seam.lean_start import adapted
from launcher.ray_seam.settings import RAY_ENVIRONMENT, RAY_TRAIN_ENVIRONMENT

MARKER = "LAUNCH_SESSION"
OBJECT_STORE_BYTES = 80_000_000  # near Ray's minimum: training data never passes through it
LOOPBACK = "127.0.0.1"
RAYS = "ray"  # a folder of the private directory: Ray makes its own directory readable by all users


class EmbeddedRay:
    """Starts a Ray for a `with` block. If this process is connected to a Ray, that one is used and left running.

    Enter it in the main thread: Ray's processes die with the thread that started them.

    Attributes:
        existing: this process was connected to a Ray before.
        directory: a private temporary directory on this machine, removed at the end.
        available: (CPUs, GPUs) of this Ray.
        one_machine: this Ray runs on one machine, so that its workers can communicate over loopback.
        address, token, marker: see `ray_session.RaySession`.

    Args:
        cpus, gpus: the resources of the Ray; default: those of this machine.
        verbose: start Ray's dashboard and print its messages. Such a Ray is not kept.
        preload: modules to import while Ray starts.
        keep_minutes: if above 0, use the Ray that an earlier command kept, or keep this one for so many idle minutes.
    """

    def __init__(
        self,
        cpus: int | None = None,
        gpus: int | None = None,
        verbose: bool = False,
        preload: Sequence[str] = (),
        keep_minutes: float = 0.0,
    ) -> None:
        self._requested = (cpus, gpus)
        self._preload = preload
        self._verbose = verbose
        self._keep_minutes = 0.0 if verbose else keep_minutes
        self._lease = contextlib.ExitStack()  # of a kept Ray
        self._kept: ray_session.RaySession | None = None
        self.marker = f"{MARKER}={uuid.uuid4().hex}"
        self.token = secrets.token_hex(32)
        self.address = ""
        self._reaper: subprocess.Popen[bytes] | None = None
        self.existing = False
        self.directory = Path()
        self.available: tuple[float, float] = (0.0, 0.0)
        self.one_machine = True

    def __enter__(self) -> EmbeddedRay:
        self.directory = private_directory()
        try:
            self.existing = ray.is_initialized()
            if self.existing:
                total = ray.cluster_resources()
                self.available = (total.get("CPU", 0.0), total.get("GPU", 0.0))
                self.one_machine = sum(node["Alive"] for node in ray.nodes()) == 1
            else:
                if self._keep_minutes > 0:
                    self._kept = self._lease.enter_context(ray_session.lease(self._keep_minutes))
                if self._kept is None or not self._connect(self._kept):
                    self._start()
        except BaseException:  # including Ctrl-C while Ray starts
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def dead_process(self) -> str | None:
        """Return the name of an essential process of this Ray that has ended; None while all are alive."""
        if self._kept is not None:
            return None if self._kept.alive() else "(the keeper of cluster.keep_minutes)"
        return None if self.existing else private.dead_process()

    def _start(self) -> None:
        defaults = zip(self._requested, resources(), strict=True)
        cpus, gpus = (default if requested is None else requested for requested, default in defaults)
        self.available = (float(cpus), float(gpus))
        name, _, value = self.marker.partition("=")
        environment = RAY_ENVIRONMENT | RAY_TRAIN_ENVIRONMENT | {"RAY_AUTH_TOKEN": self.token, name: value}
        self._reaper = _start_reaper(self.marker, self.directory)
        # The variables are only for Ray's processes: other child processes of this process must not inherit them.
        with environment_set(environment), preserved_signal_handlers(), adapted(lean=not self._verbose):
            private.refresh_settings()
            loading = preload(self._preload)
            found = ray.init(
                address="local",  # ignore the address file of another Ray
                num_cpus=cpus,
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=self._verbose,
                dashboard_host=LOOPBACK,
                log_to_driver=self._verbose,
                logging_level=logging.INFO if self._verbose else logging.ERROR,
                job_config=private.driver_job_config(),
                **private.init_options(LOOPBACK, str(self.directory / RAYS)),
            )
            loading.join()
        self.address = found.address_info["gcs_address"]

    def _connect(self, kept: ray_session.RaySession) -> bool:
        """Become a driver of a kept Ray. If it does not answer, stop it and return False."""
        environment = RAY_ENVIRONMENT | RAY_TRAIN_ENVIRONMENT | {"RAY_AUTH_TOKEN": kept.token}
        with environment_set(environment), preserved_signal_handlers(), adapted(lean=True):
            private.refresh_settings()
            loading = preload(self._preload)
            try:
                ray.init(
                    address=kept.address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    job_config=private.driver_job_config(),
                    **private.init_options(LOOPBACK),
                )
            except (OSError, RuntimeError):
                ray.shutdown()
                self._kept = None
                self._lease.close()
                ray_session.end(kept)
                return False
            finally:
                loading.join()
        self.available = (kept.cpus, kept.gpus)
        self.address, self.token, self.marker = kept.address, kept.token, kept.marker
        return True

    def _stop(self) -> None:
        released = self.existing or self._leave()
        self._lease.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        # If Ray's native code still waits for its GCS, it may write to the directory: the reaper waits for our exit.
        if self._reaper is not None and released:
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._reaper.wait(timeout=5)
            self._reaper = None

    def _leave(self) -> bool:
        """Shut this Ray down, and return whether Ray's shutdown has returned."""
        broken = self.dead_process() is not None
        if broken:
            private.drop_exception_hook()
            reaper.end(self.marker, grace=0.0)
        leaving = threading.Thread(target=_suppressed(ray.shutdown), name="launch-shutdown", daemon=True)
        leaving.start()
        # It takes a tenth of a second. Without a GCS, Ray retries the connection for a minute.
        leaving.join(3.0 if broken else 30.0)
        if leaving.is_alive():
            private.drop_exit_hook()
        if self._kept is None:
            reaper.end(self.marker, grace=0.3)
        return not leaving.is_alive()


def _suppressed(function: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        with contextlib.suppress(Exception):
            function()

    return call


def _start_reaper(marker: str, directory: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-I", "-S", reaper.__file__, marker, str(directory), str(os.getpid())]
    return subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C and a closed terminal must not kill it
    )
