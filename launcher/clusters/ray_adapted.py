"""Ray as a process of ours needs it: its environment, its signals, and what `ray.init` has no options for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Ray's metrics are off: the ports of its agents, its dashboard and its autoscaler ask for no token. The last two
# have no switch: an impossible port keeps them from listening.
NO_METRICS = {"RAY_enable_metrics_collection": "0", "DASHBOARD_METRIC_PORT": "-1", "AUTOSCALER_METRIC_PORT": "-1"}

# What every process of our Ray is told through the environment, on top of the user's own.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray writes titles over argv and environment of its processes; the reaper reads the environment.
    "SPT_NOENV": "1",
    **NO_METRICS,
}


# What Ray Train reads in the controller and on the workers.
RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # the end of a worker is noticed in this time
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less: nobody drains the only machine
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TRAIN_ENABLE_SHARE_CUDA_VISIBLE_DEVICES": "1",  # the workers of one machine reach each other's GPUs
}


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
def adapted(lean: bool) -> Iterator[None]:
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


def own_job_config() -> Any:
    """Return a job configuration by which Ray does not put the current directory before its workers' module path.

    Workers add the calling directory themselves (`launcher.config.calling_directory`): where it shadows nothing.
    """
    from ray.job_config import JobConfig

    here = os.path.realpath(os.curdir)

    class OtherPaths(list[str]):
        def extend(self, paths: Iterable[str]) -> None:
            super().extend(path for path in paths if os.path.realpath(path) != here)

    config = JobConfig()
    config._py_driver_sys_path = OtherPaths()
    return config


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


def private_directory() -> Path:
    """Make a directory that this user alone can enter, with a short name.

    The path of a Unix socket holds 107 characters, and what Ray and `local.RAYS` add takes about 80.
    """
    root = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="launch-", dir=root if len(root) <= 16 else "/tmp"))
