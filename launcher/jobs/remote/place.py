"""remote.json in a run's directory: on which cluster, and as which job, the run is driven."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from launcher.config.schema import ClusterConfig
from launcher.runs import REMOTE, RunDirectory, write_json


def is_elsewhere(cluster: ClusterConfig) -> bool:
    """Whether a run with this section is driven by the head of a cluster, not by the command itself."""
    on_url = (cluster.address or "").startswith(("http://", "https://"))
    return cluster.kind in ("ssh", "azure") or (cluster.kind == "existing" and on_url)


@dataclass(frozen=True)
class Place:
    """Where a run is driven.

    Attributes:
        job: its id in Ray Jobs.
        address: URL of the cluster's Ray Jobs API; None where the cluster is known by its head.
        head: the cluster's name (`launcher.clusters.heads`), or None.
        directory: of the run on the head, where its files are copied from there; None where they are seen here.
        config_dir: the configuration of one's own that it was sent with, as it lies here; a sweep is continued with it.
    """

    job: str
    address: str | None = None
    head: str | None = None
    directory: str | None = None
    config_dir: str | None = None

    @property
    def where(self) -> str:
        return self.head or self.address or ""

    def write(self, run: RunDirectory) -> None:
        write_json(run.path / REMOTE, asdict(self))


def place_of(run: RunDirectory) -> Place | None:
    """Return where a run is driven, or was; None for one that was driven here."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads((run.path / REMOTE).read_text())
        known = {each.name for each in fields(Place)}
        return Place(**{key: value for key, value in content.items() if key in known})
    return None


def forget(run: RunDirectory, made: list[Path]) -> None:
    """Take back what was written for a run that never began; `made` are the directories that were made for it."""
    (run.path / REMOTE).unlink(missing_ok=True)
    for path in made:
        with suppress(OSError):
            path.rmdir()
