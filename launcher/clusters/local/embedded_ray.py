"""Ray on this machine, started for one command: quiet, on loopback alone, and gone when the command is gone.

with EmbeddedRay(cpus=2, gpus=0) as cluster:
    ...  # ray.is_initialized(), cluster.directory is private scratch space
"""

from __future__ import annotations

import contextlib
import importlib
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

from launcher.clusters import reaper
from launcher.clusters.capacity import resources
from launcher.clusters.local import ray_session
from launcher.clusters.ray_process import environment_set, preserved_signal_handlers, private_directory
from launcher.ray_seam import private
from launcher.ray_seam.lean_start import adapted
from launcher.ray_seam.settings import RAY_ENVIRONMENT, RAY_TRAIN_ENVIRONMENT

MARKER = "LAUNCH_SESSION"
OBJECT_STORE_BYTES = 80_000_000  # near Ray's minimum: training data never passes through it
LOOPBACK = "127.0.0.1"
RAYS = "ray"  # of the private directory, since Ray opens the one that it is given to all users


class EmbeddedRay:
    """A Ray of our own for the length of a `with` block; or, where this process is connected to a Ray, that one.

    Enter it in the main thread: Ray's processes die with the thread that started them.

    Attributes:
        existing: this process had a Ray before; it is used as it is and left running.
        directory: private scratch space on this machine, removed at the end.
        available: CPUs and GPUs of this Ray.
        one_machine: all of this Ray is on one machine, so that its workers can talk over loopback.
        address, token, marker: of a Ray that was started here; see `ray_session.RaySession`.

    Args:
        cpus, gpus: what the Ray has, default: what this machine has.
        verbose: with Ray's dashboard and messages; such a Ray is not kept.
        preload: modules that are imported while Ray starts.
        keep_minutes: above 0 the Ray of an earlier command is used, or this one is kept so long for the next.
    """

    def __init__(
        self,
        cpus: int | None = None,
        gpus: int | None = None,
        verbose: bool = False,
        preload: Sequence[str] = (),
        keep_minutes: float = 0.0,
    ) -> None:
        self._asked = (cpus, gpus)
        self._preload = preload
        self._verbose = verbose
        self._keep_minutes = 0.0 if verbose else keep_minutes
        self._holding = contextlib.ExitStack()  # the lease of a Ray that is kept
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
        import ray

        self.directory = private_directory()
        try:
            self.existing = ray.is_initialized()
            if self.existing:
                total = ray.cluster_resources()
                self.available = (total.get("CPU", 0.0), total.get("GPU", 0.0))
                self.one_machine = sum(node["Alive"] for node in ray.nodes()) == 1
            else:
                if self._keep_minutes > 0:
                    self._kept = self._holding.enter_context(ray_session.lease(self._keep_minutes))
                if self._kept is None or not self._connect(self._kept):
                    self._start()
        except BaseException:  # Ctrl-C while Ray starts leaves nothing either
            self._stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def dead_process(self) -> str | None:
        """Return the name of a process that our Ray cannot live without and that has ended; None while all live."""
        if self._kept is not None:
            return None if self._kept.alive() else "(the keeper of cluster.keep_minutes)"
        return None if self.existing else private.dead_process()

    def _start(self) -> None:
        import ray

        here = resources()
        cpus, gpus = (have if asked is None else asked for asked, have in zip(self._asked, here, strict=True))
        self.available = (float(cpus), float(gpus))
        name, _, value = self.marker.partition("=")
        environment = RAY_ENVIRONMENT | RAY_TRAIN_ENVIRONMENT | {"RAY_AUTH_TOKEN": self.token, name: value}
        self._reaper = _start_reaper(self.marker, self.directory)
        # The variables are for Ray's processes, not for what else this process starts: so they are taken back below.
        with environment_set(environment), preserved_signal_handlers(), adapted(lean=not self._verbose):
            private.refresh_settings()
            loading = _preload(self._preload)
            found = ray.init(
                address="local",  # a stale address file of another Ray is not looked at
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
        """Become a driver of a Ray that is kept; where it does not answer, end it and return False."""
        import ray

        environment = RAY_ENVIRONMENT | RAY_TRAIN_ENVIRONMENT | {"RAY_AUTH_TOKEN": kept.token}
        with environment_set(environment), preserved_signal_handlers(), adapted(lean=True):
            private.refresh_settings()
            loading = _preload(self._preload)
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
                self._holding.close()
                ray_session.end(kept)
                return False
            finally:
                loading.join()
        self.available = (kept.cpus, kept.gpus)
        self.address, self.token, self.marker = kept.address, kept.token, kept.marker
        return True

    def _stop(self) -> None:
        left = self.existing or "ray" not in sys.modules or self._leave()
        self._holding.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        # Where Ray's native part still waits for its GCS, it may write again: then the reaper waits for our end.
        if self._reaper is not None and left:
            assert self._reaper.stdin is not None
            self._reaper.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._reaper.wait(timeout=5)
            self._reaper = None

    def _leave(self) -> bool:
        """End our Ray; return whether this process has let go of it."""
        import ray

        broken = self.dead_process() is not None
        if broken:
            private.drop_exception_hook()
            reaper.end(self.marker, grace=0.0)
        leaving = threading.Thread(target=_suppressed(ray.shutdown), name="launch-shutdown", daemon=True)
        leaving.start()
        # In order it takes a tenth of a second. Without its GCS it tries for a minute to reach it.
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
        start_new_session=True,  # neither Ctrl-C nor a closed terminal ends it
    )


def _preload(modules: Sequence[str]) -> threading.Thread:
    """Import modules in the background: `ray.init` mostly waits for other processes."""

    def load() -> None:
        for module in modules:
            with contextlib.suppress(ImportError):  # whoever needs it will meet the error where it can be told
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="launch-preload", daemon=True)
    thread.start()
    return thread
