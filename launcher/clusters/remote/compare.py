"""Checks that the nodes of a cluster can run a job of this process: versions, the project's files, directories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.clusters.capacity import Node
from launcher.clusters.remote.node_tasks import on_each_node
from launcher.errors import ClusterError

NODE_SECONDS = 60.0  # a node may have to start its first worker process
# The facts that must be equal on all nodes, and their names in an error.
COMPARED = {"python": "Python", "ray": "Ray", "torch": "torch", "project": "this project (a digest of its files)"}


def compare(nodes: Sequence[Node], python_path: Sequence[str], directory: str | None) -> None:
    """Compare every node with this process, before training starts.

    Args:
        python_path: directories that must exist on every node.
        directory: the run's directory, which every node must see; None to skip this check.

    Raises:
        ClusterError: versions differ, or a directory is missing; the message names the hosts.
    """
    home = str(Path(__file__).resolve().parents[3])
    look = facts_of_a_node()
    own = look(home, [], [])
    arguments = (home, list(python_path), [directory] if directory else [])
    problems = []
    for node, (facts, problem) in zip(nodes, on_each_node(nodes, look, *arguments, seconds=NODE_SECONDS), strict=True):
        where = f"{node.host} ({node.address})"
        if problem:
            problems.append(f"{where} did not answer: {problem}")
            continue
        for key, name in COMPARED.items():
            if facts[key] != own[key]:
                problems.append(f"{name} is {facts[key] or 'missing'} on {where} and {own[key] or 'missing'} here")
        problems += [f"the calling directory {path} is missing on {where}" for path in facts["no_modules"]]
        problems += [f"the run's directory {path} is missing on {where}" for path in facts["no_run"]]
    if problems:
        raise ClusterError(
            f"The nodes of the cluster cannot run this job: {'; '.join(problems)}. Install the same versions on every "
            "node, and keep the calling directory and run.root on a file system that all nodes mount under the same "
            "path."
        )


def facts_of_a_node() -> Callable[[str, list[str], list[str]], dict[str, Any]]:
    """Return a function that collects the facts about a node which `compare` compares.

    It is defined in a function so that it is pickled by value: launch may be missing on the node, or differ. Ray Jobs
    gets only its source, so it imports everything that it uses.
    """

    def facts(home: str, python_path: list[str], directories: list[str]) -> dict[str, Any]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import os
        import platform
        import sys
        from pathlib import Path

        def version(name: str) -> str:
            try:
                return importlib.metadata.version(name).partition("+")[0]  # torch with and without CUDA can be mixed
            except importlib.metadata.PackageNotFoundError:
                return ""

        def project() -> str:
            sys.path.append(home)
            try:
                found = [importlib.util.find_spec(name) for name in ("launcher", "models")]
            finally:
                sys.path.remove(home)
            roots = [Path(place) for spec in found if spec for place in spec.submodule_search_locations or ()]
            files = sorted(
                (path.relative_to(root.parent).as_posix(), path) for root in roots for path in root.rglob("*.py")
            )
            digest = hashlib.sha256()
            for name, path in files:
                digest.update(name.encode() + b"\0" + path.read_bytes())
            return digest.hexdigest()[:12] if files else ""

        return {
            "python": ".".join(platform.python_version_tuple()[:2]),
            "ray": version("ray"),
            "torch": version("torch"),
            "project": project(),
            "no_modules": [path for path in map(os.path.expandvars, python_path) if not os.path.isdir(path)],
            "no_run": [path for path in directories if not os.path.isdir(path)],
        }

    return facts
