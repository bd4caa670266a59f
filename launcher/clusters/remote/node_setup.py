"""Prepares the nodes for a job: installs the packages that the calling directory requires, and runs `cluster.setup`.

    setup = NodeSetup.of(directory, cluster.setup)        # in the command
    with ExistingRay(…): setup.install(nodes, calling)    # on the head, before a module of the directory is imported

The versions of torch and ray on the nodes never change: a package that requires others is rejected.
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
from launcher.clusters.remote.node_tasks import on_each_node
from launcher.config.masking import hide
from launcher.errors import ClusterError, ConfigError

INSTALL_SECONDS = 1800.0


@dataclass(frozen=True)
class NodeSetup:
    """The packages and shell lines that every node needs for a job.

    Attributes:
        file: requirements.txt of the calling directory, relative to it; None if it does not exist.
        packages: the dependencies in pyproject.toml, if there is no requirements.txt.
        setup: shell lines.
        names: names of the driver's environment variables that the shell lines can use.
    """

    file: str | None = None
    packages: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, directory: Path, setup: Sequence[str], names: Sequence[str] = ()) -> NodeSetup:
        """Read the requirements of a directory.

        Raises:
            ConfigError: its pyproject.toml cannot be parsed.
        """
        if (directory / "requirements.txt").is_file():
            return cls("requirements.txt", [], list(setup), list(names))
        packages: list[str] = []
        file = directory / "pyproject.toml"
        if file.is_file() and directory.resolve() != project.HOME:  # launch's own requirements are installed
            try:
                packages = list(tomllib.loads(file.read_text()).get("project", {}).get("dependencies", []))
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{file} cannot be parsed: {error}. Fix it: the nodes of the cluster install its dependencies."
                ) from None
        return cls(None, packages, list(setup), list(names))

    def __bool__(self) -> bool:
        return bool(self.file or self.packages or self.setup)

    def describe(self) -> str:
        """Return the sources of the setup for a message, such as `requirements.txt and cluster.setup`."""
        parts = [self.file or (f"{len(self.packages)} packages of pyproject.toml" if self.packages else "")]
        parts.append("cluster.setup" if self.setup else "")
        return " and ".join(part for part in parts if part)

    def install(self, nodes: Sequence[Node], calling: str) -> None:
        """Install the packages and run the shell lines on all nodes in parallel. Ray is initialized.

        Args:
            calling: the calling directory, or its copy on the nodes (`calling_directory.shared_path`).

        Raises:
            ClusterError: the setup failed; the message has the nodes and the output of the command that failed.
        """
        values = [os.environ[name] for name in self.names if name in os.environ]
        arguments = (str(project.HOME), calling, asdict(self))
        problems: dict[str, list[str]] = {}
        answers = on_each_node(nodes, _work(), *arguments, seconds=INSTALL_SECONDS)
        for node, (output, problem) in zip(nodes, answers, strict=True):
            if text := problem or output:
                for value in values:
                    text = text.replace(value, "***")
                problems.setdefault(hide(text), []).append(f"{node.host} ({node.address})")
        if problems:
            failures = "; ".join(f"{', '.join(hosts)}: {text}" for text, hosts in problems.items())
            raise ClusterError(f"The nodes could not be prepared ({self.describe()}). {failures}")


def _work() -> Callable[[str, str, dict[str, Any]], str]:
    """Return the function that sets up a node. It is defined in a function so that it is pickled by value."""

    def work(home: str, calling: str, setup: dict[str, Any]) -> str:
        """Return a description of the failure; empty if the node is set up."""
        import importlib.metadata
        import os
        import subprocess
        import sys
        import tempfile

        if home not in sys.path:
            sys.path.append(home)
        from launcher.clusters.remote.from_driver import adopt
        from launcher.config.calling_directory import own_path

        adopt()
        directory = own_path(calling) if own_path(calling).is_dir() else os.getcwd()

        def run(words: list[str], what: str) -> str:
            done = subprocess.run(words, cwd=directory, capture_output=True, text=True, errors="replace", check=False)
            output, errors = (
                [line.strip() for line in text.splitlines() if line.strip()] for text in (done.stdout, done.stderr)
            )
            # pip explains a conflict in a block of its output that starts with this line, and prints advice after it.
            conflict = next((i for i, line in enumerate(output) if "conflict is caused by" in line), None)
            lines = (errors or output)[-4:] if conflict is None else output[conflict : conflict + 6]
            shown = " ".join(lines)[-700:]
            return f"{what} failed with status {done.returncode}: {shown or 'no output'}" if done.returncode else ""

        # Arguments are visible in the list of processes, and the URL of an index or a shell line may have a password.
        def file_with(lines: list[str], suffix: str) -> Any:
            file = tempfile.NamedTemporaryFile("w", suffix=suffix)  # noqa: SIM115 (the caller closes it)
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            return file

        if setup["file"] or setup["packages"]:
            pins = []
            for name in ("torch", "ray"):
                try:
                    pins.append(f"{name}=={importlib.metadata.version(name)}")
                except importlib.metadata.PackageNotFoundError:
                    continue
            with file_with(pins, ".txt") as constraints, file_with(setup["packages"], ".txt") as packages:
                words = [sys.executable, "-P", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
                words += [
                    "--constraint",
                    constraints.name,
                ]  # not --quiet, which leaves out the explanation of a conflict
                words += ["--requirement", setup["file"] or packages.name]
                if problem := run(words, f"pip install (with {', '.join(pins)})"):
                    return problem
        for line in setup["setup"]:
            with file_with([line], ".sh") as script:
                if problem := run(["sh", script.name], f"`{line}`"):
                    return problem
        return ""

    return work
