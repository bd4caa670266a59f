"""Ray on this machine, started for one command: quiet, on loopback alone, and gone when the command is gone.

with EmbeddedRay(cpus=2, gpus=0) as cluster:
    ...  # ray.is_initialized(), cluster.directory is private scratch space
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.clusters import keep, reaper
from launcher.errors import ResourceError

MARKER = "LAUNCH_SESSION"
OBJECT_STORE_BYTES = 80_000_000  # near Ray's minimum: training data never passes through it
LOOPBACK = "127.0.0.1"

# What every process of our Ray is told through the environment, on top of the user's own.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray writes titles over argv and environment of its processes; the reaper reads the environment.
    "SPT_NOENV": "1",
}

# What Ray Train reads in the controller and on the workers.
RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # the end of a worker is noticed in this time
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less: nobody drains the only machine
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",  # the workers of one machine reach each other's GPUs
}


# ---- what this machine has ------------------------------------------------------------------------------------------


def connected() -> bool:
    """Whether this process has a Ray already, which is then the one to use."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def resources() -> tuple[int, int]:
    """Return how many CPUs (at least 1) and GPUs this process may use, or the Ray has that it is connected to.

    Starts nothing, imports no torch.
    """
    if connected():
        total = sys.modules["ray"].cluster_resources()
        return max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cpus, math.floor(quota + 1e-6)) if quota else cpus), _gpus()


def _cpu_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPUs that the control group (version 2, then 1) grants, or None without a limit."""
    quotas = []
    with contextlib.suppress(OSError, ValueError):
        own = next(line.strip().split("::")[1] for line in membership.read_text().splitlines() if "::" in line)
        for group in (root / own.lstrip("/"), *(root / own.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):
                quota, period = (group / "cpu.max").read_text().split()
                quotas.append(int(quota) / int(period))  # "max" is no number: no limit in this group
            if group == root:
                break
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            quotas.append(quota_us / int((root / "cpu/cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


# Where Linux shows GPUs (NVIDIA's, AMD's, Intel's, WSL's). Importing Ray to learn that there is none takes 0.25 s.
_DEVICE_FILES = ("nvidia*", "kfd", "dri", "dxg", "accel")


def _gpus() -> int:
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DEVICE_FILES):
        return 0
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None:
        return 0
    visible = manager.get_current_process_visible_accelerator_ids()  # None: CUDA_VISIBLE_DEVICES is not set
    found = int(manager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))


def check_feasible(
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    available: tuple[float, float],
    where: str = "here",
) -> None:
    """Refuse a request that can never be met, before anything is started.

    Args:
        workers: how many workers are asked for.
        cpus_per_worker: CPUs that each reserves; fractions are allowed.
        gpus_per_worker: GPUs that each reserves; fractions below 1 are allowed.
        available: CPUs and GPUs that there are at most, as `resources` returns them.
        where: the words for the place that has them.

    Raises:
        ResourceError: the workers do not fit; names both numbers and what to set.
    """
    for unit, key, each, have in (
        ("CPU", "cpus_per_worker", cpus_per_worker, available[0]),
        ("GPU", "gpus_per_worker", gpus_per_worker, available[1]),
    ):
        most = most_workers(each, have, whole=unit == "GPU")
        if workers <= most:
            continue
        asked = f"{workers} worker{'s' if workers > 1 else ''} with {each:g} {unit} each ({workers * each:g} in all)"
        cures = [f"scaling.workers={most}"] if most else []
        share = math.floor(have / workers * 100) / 100
        # Halves of a GPU serve several small trainings, not the workers of one: NCCL refuses two ranks on one device.
        if share > 0 and unit == "CPU":
            cures.append(f"scaling.{key}={share:g}")
        if unit == "GPU" and not most:
            cures.append("scaling.device=cpu" if have < 1 else f"scaling.{key}={have:g}")
        raise ResourceError(
            f"{asked} were asked for, and there are {have:g} {unit}s {where}. Set {' or '.join(cures)}, "
            "or use a larger machine or a cluster."
        )


def most_workers(each: float, have: float, whole: bool) -> float:
    """Return how many shares of `each` fit into `have` units; a share of less than one unit never spans two GPUs."""
    if each <= 0:
        return math.inf
    if whole and each < 1:
        return math.floor(have) * math.floor(1 / each + 1e-6)
    return math.floor(have / each + 1e-6)


# ---- Ray ------------------------------------------------------------------------------------------------------------


class EmbeddedRay:
    """A Ray of our own for the length of a `with` block; or, where this process is connected to a Ray, that one.

    Enter it in the main thread: Ray's processes die with the thread that started them.

    Attributes:
        existing: this process had a Ray before; it is used as it is and left running.
        directory: private scratch space on this machine, removed at the end.
        available: CPUs and GPUs of this Ray.
        one_machine: all of this Ray is on one machine, so that its workers can talk over loopback.
        address, token, marker: of a Ray that was started here; see `keep.Kept`.

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
        self._kept: keep.Kept | None = None
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
                    self._kept = self._holding.enter_context(keep.lease(self._keep_minutes))
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
        from ray._private import worker

        if self._kept is not None:
            return None if self._kept.alive() else "(the keeper of cluster.keep_minutes)"
        node = None if self.existing else worker._global_node
        return next((name for name, _ in node.dead_processes()), None) if node is not None else None

    def _start(self) -> None:
        import ray

        here = resources()
        cpus, gpus = (have if asked is None else asked for asked, have in zip(self._asked, here, strict=True))
        self.available = (float(cpus), float(gpus))
        name, _, value = self.marker.partition("=")
        environment = _ENVIRONMENT | RAY_TRAIN_ENVIRONMENT | {"RAY_AUTH_TOKEN": self.token, name: value}
        self._reaper = _start_reaper(self.marker, self.directory)
        # The variables are for Ray's processes, not for what else this process starts: so they are taken back below.
        with environment_set(environment), signal_handlers_kept(), _adapted(lean=not self._verbose):
            refresh_ray_settings()
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
                _node_ip_address=LOOPBACK,
                _temp_dir=str(self.directory),
            )
            loading.join()
        self.address = found.address_info["gcs_address"]

    def _connect(self, kept: keep.Kept) -> bool:
        """Become a driver of a Ray that is kept; where it does not answer, end it and return False."""
        import ray

        environment = _ENVIRONMENT | RAY_TRAIN_ENVIRONMENT | {"RAY_AUTH_TOKEN": kept.token}
        with environment_set(environment), signal_handlers_kept(), _adapted(lean=True):
            refresh_ray_settings()
            loading = _preload(self._preload)
            try:
                ray.init(
                    address=kept.address, log_to_driver=False, logging_level=logging.ERROR, _node_ip_address=LOOPBACK
                )
            except (OSError, RuntimeError):
                ray.shutdown()
                self._kept = None
                self._holding.close()
                keep.end(kept)
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
            sys.excepthook = sys.__excepthook__  # Ray's own tells its GCS of the exception, and waits
            reaper.end(self.marker, grace=0.0)
        leaving = threading.Thread(target=_suppressed(ray.shutdown), name="launch-shutdown", daemon=True)
        leaving.start()
        # In order it takes a tenth of a second. Without its GCS it tries for a minute to reach it.
        leaving.join(3.0 if broken else 30.0)
        if leaving.is_alive():
            atexit.unregister(ray.shutdown)
        if self._kept is None:
            reaper.end(self.marker, grace=0.3)
        return not leaving.is_alive()


def _suppressed(function: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        with contextlib.suppress(Exception):
            function()

    return call


def private_directory() -> Path:
    """Make a directory whose name is short: the path of a Unix socket holds 107 characters, and Ray adds about 75."""
    root = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="launch-", dir=root if len(root) <= 16 else "/tmp"))


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


@contextlib.contextmanager
def environment_set(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the length of the block; what Ray sets meanwhile (PYTHONBREAKPOINT) is taken back as well."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Give the signals back to who had them: Ray's native part takes SIGTERM, to print its stack and die."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def refresh_ray_settings() -> None:
    """Have Ray's native part read its environment again: it did so once, when ray was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _adapted(lean: bool) -> Iterator[None]:
    """Have `ray.init` stay on loopback and out of our process group and, when `lean`, start only what one job needs.

    Ray's processes get a process group of their own: Ctrl-C and `timeout` signal the whole group of the command, and it
    is ours to end the run in order. Lean leaves out the autoscaler's monitor, the log monitor (nothing is forwarded),
    the dashboard's server (Ray starts one for its API even with `include_dashboard=False`) and what the node's agent
    does for it: three Python processes, and two to three seconds.
    `ray.init` has no options for this. Ray's version is pinned.
    """
    from ray._private import node, parameter, ray_constants, services, utils

    class LeanParameters(parameter.RayParams):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.no_monitor = True
            self.include_log_monitor = False

    def no_api_server(self: Any, **_: Any) -> None:
        self._webui_url = ""

    class GroupLeader(services.ConsolePopen):
        def __init__(self, *args: Any, **options: Any) -> None:
            # Without the terminal's input: reading it from another process group would halt a worker for ever.
            if options.get("stdin") is None:
                options["stdin"] = subprocess.DEVNULL
            super().__init__(*args, **{**options, "process_group": 0})

    replacements: list[tuple[Any, str, Any]] = [
        (services, "ConsolePopen", GroupLeader),
        (ray_constants, "ENABLE_RAY_CLUSTER", False),  # what Ray sets on macOS and Windows: every server on 127.0.0.1
    ]
    if lean:
        replacements += [
            (parameter, "RayParams", LeanParameters),
            (node.Node, "start_api_server", no_api_server),
            (utils, "get_dashboard_dependency_error", lambda: ImportError("left out")),
            *silence(),
        ]
    with replaced(replacements):
        yield


def silence() -> list[tuple[Any, str, Any]]:
    """Return what keeps Ray from printing what a lost worker or node means to it."""
    from ray._private import worker

    return [(worker, "listen_error_messages", lambda *_: None)]


@contextlib.contextmanager
def replaced(replacements: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of Ray's modules for the length of the block; a name that is not there is left as it is."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements if hasattr(owner, name)]
    try:
        for owner, name, value in replacements:
            if hasattr(owner, name):
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _preload(modules: Sequence[str]) -> threading.Thread:
    """Import modules in the background: `ray.init` mostly waits for other processes."""

    def load() -> None:
        for module in modules:
            with contextlib.suppress(ImportError):  # whoever needs it will meet the error where it can be told
                importlib.import_module(module)

    thread = threading.Thread(target=load, name="launch-preload", daemon=True)
    thread.start()
    return thread
