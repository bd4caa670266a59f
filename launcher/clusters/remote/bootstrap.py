"""A host becomes ready: what is sent to it, and what it is asked to do (`on_host`).

facts = ask(shell, "look", place, …)          # a HostError says what is wrong
answers = everywhere(hosts, function)         # all at a time; a HostError is an answer, too
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

# What starts `on_host` there: the modules come as JSON, each stands under its own name.
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
sys.modules["launcher.clusters.remote.on_host"].main(given["order"])
"""
_NO_PYTHON = 97


def ask(shell: Shell, order: str, by: str | None = None, seconds: float = 60.0, **facts: Any) -> dict[str, Any]:
    """Have a host do one of `on_host.ORDERS` and return its answer.

    Args:
        by: an interpreter there that does it; default: the `python3` of its PATH.
        facts: of the order.

    Raises:
        HostError: no connection, no Python, or what was asked cannot be done there.
    """
    modules = {"launcher": "", "launcher.clusters": "", "launcher.clusters.remote": "", "launcher.ray_seam": ""}
    for module in (reaper, settings, on_host):
        modules[module.__name__] = inspect.getsource(module)
    given = json.dumps({"modules": modules, "order": {"order": order, **facts}})
    candidates = f"{shlex.quote(by)} python3 python" if by else "python3 python"
    script = (
        f'for python in {candidates}; do command -v "$python" >/dev/null 2>&1 && break; python=; done; '
        f'[ -n "$python" ] || exit {_NO_PYTHON}; exec "$python" -I -S -c {shlex.quote(_LOADER)}'
    )
    what = {"make_environment": "making the Python environment", "start": "starting Ray", "stop": "ending Ray"}
    try:
        printed = shell.run(script, stdin=given, seconds=seconds, what=what.get(order, "looking around"))
        answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
    except HostError as error:
        if f"status {_NO_PYTHON}" not in str(error):
            raise
        raise HostError(
            f"On {shell.name} there is no Python at all. Install it (Debian and Ubuntu: apt-get install python3-venv), "
            "or name one: cluster.python=/PATH/TO/python.",
            shell.name,
            "failed",
        ) from None
    except (ValueError, IndexError):
        raise HostError(
            f"{shell.name} answered {printed[-200:]!r}, and not to what it was asked. Does its shell print something "
            "and end?",
            shell.name,
            "failed",
        ) from None
    if "failed" in answer:
        raise HostError(f"On {shell.name} {answer['failed']}.", shell.name, "failed")
    return dict(answer["done"])


def everywhere(hosts: Sequence[_H], function: Callable[[_H], _T]) -> list[_T | HostError]:
    """Call a function for every host at a time, and return its answers in their order; a HostError is one as well."""

    def one(host: _H) -> _T | HostError:
        try:
            return function(host)
        except HostError as error:
            return error

    if not hosts:
        return []
    with ThreadPoolExecutor(max_workers=min(len(hosts), 32)) as pool:
        return list(pool.map(one, hosts))


@dataclass(frozen=True)
class Environment:
    """A Python environment to be had on hosts. `digest` names it: of everything that it is made from."""

    version: str
    requirements: str
    constraints: str

    @property
    def digest(self) -> str:
        content = "\0".join((self.version, self.requirements, self.constraints))
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @classmethod
    def own(cls) -> Environment:
        """Return one like this process's: its version of Python, and the versions that were tested together."""
        version = "{}.{}".format(*sys.version_info)
        hashed, pinned = project.HOME / "locks" / "linux.txt", project.HOME / "constraints.txt"
        if hashed.is_file():
            return cls(version, hashed.read_text(), "")
        if pinned.is_file():
            constraints = pinned.read_text()
        else:  # an installed package: what is installed beside it
            found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
            constraints = "".join(f"{name}=={version}\n" for name, version in sorted(found.items()) if name != PACKAGE)
        return cls(version, "".join(f"{line}\n" for line in _requirements()), constraints)

    def make(self, shell: Shell, base: str, cluster: str) -> str:
        """Make it on a host unless it is there, which takes minutes. Return its interpreter."""
        facts = {"version": self.version, "requirements": self.requirements, "constraints": self.constraints}
        answer = ask(
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
    """Return what launch needs, and what the ready-made experiments do."""
    try:
        stated = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ClusterError(
            f"What launch needs is not known here: it was not installed ({PACKAGE} is no package of this Python). "
            "Install it with pip, or name an environment on the hosts: cluster.python=/PATH/TO/python."
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


# ---- what is alike --------------------------------------------------------------------------------------------------


def check_versions(name: str, python: str, versions: dict[str, str]) -> None:
    """Compare the environment of a host with this process's.

    Raises:
        HostError: Python, Ray or torch are of another version there, or missing.
    """
    own = {"python": "{}.{}".format(*sys.version_info)}
    for package in ("ray", "torch"):
        own[package] = importlib.metadata.version(package).partition("+")[0]
    there = {key: value.partition("+")[0] for key, value in versions.items()}
    there["python"] = there.get("python", "").rpartition(".")[0]
    differs = [
        f"{key} is {there.get(key) or 'missing'} there and {version} here"
        for key, version in own.items()
        if there.get(key) != version
    ]
    if differs:
        raise HostError(
            f"On {name} the Python {python} cannot be used: {', '.join(differs)}. Install the same versions there, or "
            "leave cluster.python out: the environment is then made from the versions that were tested together.",
            name,
            "failed",
        )
