"""Replaces parts of Ray while `ray.init` starts an embedded Ray, since `ray.init` has no options for it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import Any

from ray._private import node, parameter, ray_constants, services, utils

from launcher.ray_seam.private import attribute, quiet_errors, replaced


@contextlib.contextmanager
def adapted(lean: bool) -> Iterator[None]:
    """Start Ray on loopback and in its own process group and, if `lean`, only the processes that one job needs.

    A lean start saves three Python processes and two to three seconds.
    """
    with contextlib.ExitStack() as stack:
        parts = [own_process_group(), loopback_alone()]
        if lean:
            parts += [without_monitors(), without_dashboard(), without_agent_server(), quiet_errors()]
        for part in parts:
            stack.enter_context(part)
        yield


@contextlib.contextmanager
def own_process_group() -> Iterator[None]:
    """Start Ray's processes in a process group of their own.

    Why: Ctrl-C and `timeout` signal the whole process group of a command, and launch stops the run gracefully.
    Since: 2.44 or older.
    Without: Ctrl-C kills the workers before they save a checkpoint.
    """

    class GroupLeader(attribute(services, "ConsolePopen")):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # Without the terminal's input: the system stops a process of another process group that reads it.
            if options.get("stdin") is None:
                options["stdin"] = subprocess.DEVNULL
            super().__init__(*args, **{**options, "process_group": 0})

    with replaced(services, "ConsolePopen", GroupLeader):
        yield


@contextlib.contextmanager
def loopback_alone() -> Iterator[None]:
    """Listen on 127.0.0.1 alone, as Ray does on macOS and Windows.

    Why: on Linux several servers of Ray listen on all interfaces whatever the node's address is.
    Since: 2.44 or older.
    Without: other machines can connect to a Ray that serves one command.
    """
    with replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextlib.contextmanager
def without_monitors() -> Iterator[None]:
    """Start neither the autoscaler's monitor nor the log monitor.

    Why: there is no second node to start, and no log is forwarded.
    Since: 2.44 or older.
    Without: two processes more, and about a second.
    """

    class LeanParameters(attribute(parameter, "RayParams")):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.no_monitor = True
            self.include_log_monitor = False

    with replaced(parameter, "RayParams", LeanParameters):
        yield


@contextlib.contextmanager
def without_dashboard() -> Iterator[None]:
    """Do not start the dashboard's server, which Ray starts for its API even with `include_dashboard=False`.

    Why: launch does not use that API on one machine.
    Since: 2.44 or older.
    Without: one process more, and a second.
    """

    def no_api_server(self: Any, **_: Any) -> None:
        self._webui_url = ""

    with replaced(node.Node, "start_api_server", no_api_server):
        yield


@contextlib.contextmanager
def without_agent_server() -> Iterator[None]:
    """Start the node's agent without what it does for the dashboard.

    Why: Ray starts those parts where the dashboard's packages are installed.
    Since: 2.49 or older.
    Without: the agent takes longer to start, and serves more ports.
    """
    with replaced(utils, "get_dashboard_dependency_error", lambda: ImportError("left out")):
        yield
