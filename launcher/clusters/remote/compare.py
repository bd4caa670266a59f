"""Whether the nodes of a cluster can run a job as it is here: versions, the project, directories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launcher.clusters.capacity import Node
from launcher.errors import ClusterError

NODE_SECONDS = 60.0  # a node may have to start its first worker process


# What has to be alike, and what an error calls it.
COMPARED = {"python": "Python", "ray": "Ray", "torch": "torch", "project": "this project (a digest of its files)"}


def compare(nodes: Sequence[Node], python_path: Sequence[str], directory: str | None) -> None:
    """Compare every node with this process, before anything is trained.

    Raises:
        ClusterError: versions differ, or a directory is not there; names hosts.
    """
    home = str(Path(__file__).resolve().parents[3])
    own = facts_of_a_node()(home, [], [])
    problems = []
    for node, facts in zip(nodes, _ask(nodes, home, python_path, [directory] if directory else []), strict=True):
        where = f"{node.host} ({node.address})"
        if isinstance(facts, str):
            problems.append(f"{where} did not answer: {facts}")
            continue
        for key, name in COMPARED.items():
            if facts[key] != own[key]:
                problems.append(f"{name} is {facts[key] or 'missing'} on {where} and {own[key] or 'missing'} here")
        problems += [f"the calling directory {path} is not there on {where}" for path in facts["no_modules"]]
        problems += [f"the run's directory {path} is not seen on {where}" for path in facts["no_run"]]
    if problems:
        raise ClusterError(
            f"The nodes of the cluster cannot run this job as it is here: {'; '.join(problems)}. Install the same "
            "versions on every node, and keep the calling directory and run.root on a file system that all nodes "
            "share under the same path."
        )


def _ask(
    nodes: Sequence[Node], home: str, python_path: Sequence[str], directories: Sequence[str]
) -> list[dict[str, Any] | str]:
    """Return the facts of every node, or why there are none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    facts = facts_of_a_node()

    def ask(node: Node) -> Any:
        place = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(facts)
        return task.remote(home, list(python_path), list(directories))

    asked = [ask(node) for node in nodes]
    done = set(ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS)[0])
    answers: list[dict[str, Any] | str] = []
    for one in asked:
        if one not in done:
            answers.append(f"no answer within {NODE_SECONDS:g} s")
            continue
        try:
            answers.append(ray.get(one))
        except Exception as error:
            answers.append((str(error).strip().splitlines() or [type(error).__name__])[-1])
    return answers


def facts_of_a_node() -> Callable[[str, list[str], list[str]], dict[str, Any]]:
    """Return a function that finds out what a node has.

    A function within a function travels by value: our package may not be installed there, or be another. Through Ray
    Jobs its source travels alone, so that it imports all that it needs itself.
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
                return importlib.metadata.version(name).partition("+")[0]  # torch with and without CUDA talk
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
            "no_modules": [path for path in python_path if not os.path.isdir(path)],
            "no_run": [path for path in directories if not os.path.isdir(path)],
        }

    return facts
