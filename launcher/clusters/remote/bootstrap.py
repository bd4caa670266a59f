"""Runs the commands of `on_host` on hosts, and describes the Python environment that hosts get.

facts = run_on_host(shell, "look", python, …)   # raises HostError
answers = everywhere(hosts, function)           # in parallel; a HostError is an answer as well
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from launcher.clusters import reaper
from launcher.clusters.remote import on_host, project
from launcher.clusters.remote.shell import Shell
from launcher.errors import ClusterError, HostError
from launcher.ray_seam import settings

BASE = "~/.launch"
PACKAGE = "launch-train"
EXTRA = "examples"  # what the ready-made experiments read
ENVIRONMENT_SECONDS = 3600.0
_T = TypeVar("_T")
_H = TypeVar("_H")

# The program that starts `on_host` on a host: it reads the source of the modules as JSON and imports them.
_LOADER = """\
import json, sys, types
given = json.loads(sys.stdin.buffer.read())
for name, source in given["modules"].items():
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
    exec(compile(source, name, "exec"), module.__dict__)
sys.modules["launcher.clusters.remote.on_host"].main(given["command"])
"""


def run_on_host(
    shell: Shell,
    command: str,
    interpreter: str | None = None,
    seconds: float = 60.0,
    checks: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Run one of `on_host.COMMANDS` on a host and return its answer.

    Args:
        interpreter: the Python that runs it; default: `python3` in the PATH of the host.
        seconds: the time limit.
        checks: as for `Shell.run`.
        arguments: of the command.

    Raises:
        HostError: no connection, no Python on the host, or the command failed.
    """
    modules = {"launcher": "", "launcher.clusters": "", "launcher.clusters.remote": "", "launcher.ray_seam": ""}
    for module in (reaper, settings, on_host):
        modules[module.__name__] = inspect.getsource(module)
    given = json.dumps({"modules": modules, "command": {"command": command, **arguments}})
    candidates = f"{shlex.quote(interpreter)} python3 python" if interpreter else "python3 python"
    script = (
        f'for python in {candidates}; do command -v "$python" >/dev/null 2>&1 && break; python=; done; '
        f'[ -n "$python" ] || {{ echo null; exit; }}; exec "$python" -I -S -c {shlex.quote(_LOADER)}'
    )
    what = {"make_environment": "creating the Python environment", "start": "starting Ray", "stop": "stopping Ray"}
    what["probe"] = "running a test job"
    try:
        doing = what.get(command, "inspecting the host")
        printed = shell.run(script, stdin=given, seconds=seconds, what=doing, checks=checks)
        answer: dict[str, Any] | None = json.loads(printed.splitlines()[-1])
    except (ValueError, IndexError):
        raise HostError(
            f"{shell.name} printed {printed[-200:]!r} instead of an answer. Its shell may exit before it runs "
            "commands. Remove output and `exit` from its ~/.bashrc for shells that are not interactive.",
            shell.name,
            "failed",
        ) from None
    if answer is None:
        raise HostError(
            f"{shell.name} has no Python. Install it (Debian and Ubuntu: apt-get install python3-venv), or name an "
            "interpreter with cluster.python=/PATH/TO/python.",
            shell.name,
            "failed",
        )
    if "failed" in answer:
        raise HostError(f"On {shell.name} {answer['failed']}.", shell.name, "failed")
    return dict(answer["done"])


def everywhere(hosts: Sequence[_H], function: Callable[[_H], _T]) -> list[_T | HostError]:
    """Call a function for all hosts in parallel, and return the results in their order; a HostError is a result."""

    def call(host: _H) -> _T | HostError:
        try:
            return function(host)
        except HostError as error:
            return error

    if not hosts:
        return []
    with ThreadPoolExecutor(max_workers=min(len(hosts), 32)) as pool:
        return list(pool.map(call, hosts))


@dataclass(frozen=True)
class Environment:
    """A Python environment for hosts. Its name is `digest`, the hash of its contents."""

    version: str
    requirements: str
    constraints: str

    @property
    def digest(self) -> str:
        content = "\0".join((self.version, self.requirements, self.constraints))
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @classmethod
    def own(cls) -> Environment:
        """Return the environment of this process: its version of Python, and the versions that were tested together."""
        version = "{}.{}".format(*sys.version_info)
        hashed, pinned = project.HOME / "locks" / "linux.txt", project.HOME / "constraints.txt"
        if hashed.is_file():
            return cls(version, hashed.read_text(), "")
        if pinned.is_file():
            constraints = pinned.read_text()
        else:  # launch is an installed package
            found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
            constraints = "".join(f"{name}=={version}\n" for name, version in sorted(found.items()) if name != PACKAGE)
        return cls(version, "".join(f"{line}\n" for line in _requirements()), constraints)

    def create(self, shell: Shell, base: str, cluster: str) -> str:
        """Create the environment on a host, which takes minutes, unless it exists. Return its interpreter."""
        facts: dict[str, Any] = {
            "version": self.version,
            "requirements": self.requirements,
            "constraints": self.constraints,
        }
        answer = run_on_host(
            shell,
            "make_environment",
            seconds=ENVIRONMENT_SECONDS,
            base=base,
            cluster=cluster,
            digest=self.digest,
            **facts,
        )
        return str(answer["python"])


def _requirements() -> list[str]:
    """Return the requirements of launch and of the ready-made experiments."""
    try:
        stated = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ClusterError(
            f"The requirements of launch are unknown, because it is not an installed package of this Python "
            f"({PACKAGE}). Install it with pip, or name an environment on the hosts with "
            "cluster.python=/PATH/TO/python."
        ) from None
    found = []
    for line in stated:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        if extra is None:
            found.append(line)
        elif extra[1] == EXTRA:
            found.append(requirement.strip())
    return sorted(found)


# ---- comparison -----------------------------------------------------------------------------------------------------


def check_versions(name: str, python: str, versions: dict[str, str]) -> None:
    """Compare the versions in the environment of a host with those of this process.

    Raises:
        HostError: the versions of Python, Ray or torch differ, or one is missing.
    """
    own = {"python": "{}.{}".format(*sys.version_info)}
    for package in ("ray", "torch"):
        own[package] = importlib.metadata.version(package).partition("+")[0]
    installed = {key: value.partition("+")[0] for key, value in versions.items()}
    installed["python"] = installed.get("python", "").rpartition(".")[0]
    different = [
        f"{key} is {installed.get(key) or 'missing'} on {name} and {version} here"
        for key, version in own.items()
        if installed.get(key) != version
    ]
    if different:
        raise HostError(
            f"The Python {python} on {name} cannot be used: {', '.join(different)}. Install the same versions on "
            f"{name}, or leave cluster.python out: launch then creates an environment with the tested versions.",
            name,
            "failed",
        )
