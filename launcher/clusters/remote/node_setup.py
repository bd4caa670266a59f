"""What a job needs on the nodes beside launch: packages that the calling directory names, and shell lines.

    needs = NodeSetup.of(directory, cluster.setup)      # where the command is given
    with ExistingRay(…): needs.install(nodes, calling) # on the head, before anything of the directory is imported

torch and ray stay as they are on every node: a package that wants others is refused.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.clusters.capacity import Node
from launcher.clusters.remote import project
from launcher.config.masking import hide
from launcher.errors import ClusterError, ConfigError

INSTALL_SECONDS = 1800.0
PINNED = ("torch", "ray")


@dataclass(frozen=True)
class NodeSetup:
    """What has to be there on every node.

    Attributes:
        file: requirements.txt of the calling directory, relative to it; None where there is none.
        packages: what its pyproject.toml depends on otherwise.
        setup: shell lines.
        names: variables of the driver's environment that the lines see.
    """

    file: str | None = None
    packages: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, directory: Path, setup: Sequence[str], names: Sequence[str] = ()) -> NodeSetup:
        """Read what a directory says that it needs.

        Raises:
            ConfigError: its pyproject.toml cannot be read.
        """
        if (directory / "requirements.txt").is_file():
            return cls("requirements.txt", [], list(setup), list(names))
        packages: list[str] = []
        stated = directory / "pyproject.toml"
        if stated.is_file() and directory.resolve() != project.HOME:  # launch's own are there
            try:
                packages = list(tomllib.loads(stated.read_text()).get("project", {}).get("dependencies", []))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{stated} cannot be read: {error}. Mend it; a cluster installs what it names."
                ) from None
        return cls(None, packages, list(setup), list(names))

    def __bool__(self) -> bool:
        return bool(self.file or self.packages or self.setup)

    def describe(self) -> str:
        parts = [self.file or (f"{len(self.packages)} packages of pyproject.toml" if self.packages else "")]
        parts.append("cluster.setup" if self.setup else "")
        return " and ".join(part for part in parts if part)

    def install(self, nodes: Sequence[Node], calling: str) -> None:
        """Install and run what is needed, on all nodes at the same time. Ray is initialised.

        Raises:
            ClusterError: names the nodes where it failed, and what was said there.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        values = {name: os.environ[name] for name in self.names if name in os.environ}
        work = _work()

        def start(node: Node) -> Any:
            place = NodeAffinitySchedulingStrategy(node.id, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(work)
            return task.remote(str(project.HOME), calling, asdict(self))

        started = [start(node) for node in nodes]
        done = set(ray.wait(started, num_returns=len(started), timeout=INSTALL_SECONDS)[0])
        problems = []
        for node, one in zip(nodes, started, strict=True):
            try:
                said = ray.get(one) if one in done else f"no end within {INSTALL_SECONDS / 60:g} minutes"
            except Exception as error:
                said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            if said:
                for value in values.values():
                    said = said.replace(value, "***")
                said = hide(said)
                problems.append(f"{node.host} ({node.address}): {said}")
        if problems:
            raise ClusterError(
                f"What the job needs ({self.describe()}) is not there on all nodes. {'; '.join(problems)}"
            )


def _work() -> Callable[[str, str, dict[str, Any]], str]:
    """Return what is done on a node. A function within a function travels by value."""

    def work(home: str, calling: str, needs: dict[str, Any]) -> str:
        """Return what went wrong, in words; nothing where all is well."""
        import importlib.metadata
        import os
        import subprocess
        import sys
        import tempfile

        if home not in sys.path:
            sys.path.append(home)
        from launcher.clusters.remote.from_driver import adopt

        adopt()
        directory = calling if os.path.isdir(calling) else os.getcwd()

        def run(words: list[str], what: str) -> str:
            done = subprocess.run(words, cwd=directory, capture_output=True, text=True, errors="replace", check=False)
            said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            last = " ".join(said[-4:])[-500:] or "it said nothing"
            return f"{what} ended with status {done.returncode}: {last}" if done.returncode else ""

        # Words stand in the list of processes, and an index's address or a line of shell may hold a password.
        def file_with(lines: list[str], suffix: str) -> Any:
            file = tempfile.NamedTemporaryFile("w", suffix=suffix)  # noqa: SIM115 (the caller closes it)
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            return file

        if needs["file"] or needs["packages"]:
            pins = []
            for name in ("torch", "ray"):
                try:
                    pins.append(f"{name}=={importlib.metadata.version(name)}")
                except importlib.metadata.PackageNotFoundError:
                    continue
            with file_with(pins, ".txt") as constraints, file_with(needs["packages"], ".txt") as packages:
                words = [sys.executable, "-P", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
                words += ["--quiet", "--constraint", constraints.name]
                words += ["--requirement", needs["file"] or packages.name]
                if problem := run(words, f"pip install ({', '.join(pins)} stay)"):
                    return problem
        for line in needs["setup"]:
            with file_with([line], ".sh") as script:
                if problem := run(["sh", script.name], f"`{line}`"):
                    return problem
        return ""

    return work
