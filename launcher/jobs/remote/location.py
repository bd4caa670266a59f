"""The location of a remote run: its cluster and job, in the run's remote.json and in the user's state directory.

remote.json marks the run as remote for all readers of its directory. A command only connects to a location that the
record in the state directory (`launcher.runs.user_state`) confirms, since the directory may come from another person.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from launcher.clusters.base import kind_of
from launcher.config.schema import ClusterConfig
from launcher.errors import RunError
from launcher.runs import REMOTE, RunDirectory, user_state, write_json
from launcher.runs.plain_files import read_json


def is_remote(cluster: ClusterConfig) -> bool:
    """Return whether the driver of a run with this section runs on the head of a cluster, not in this process."""
    return kind_of(cluster).is_remote(cluster)


@dataclass(frozen=True)
class RunLocation:
    """The cluster and the job of a remote run.

    Attributes:
        job: its id in Ray Jobs.
        address: URL of the cluster's Ray Jobs API; None if the cluster has a recorded head.
        head: the cluster's name (`launcher.clusters.remote.registry`), or None.
        directory: the run's directory on the head; None if this machine sees the files itself.
        config_dir: the local directory of the user's own configuration, with which a sweep is resumed.
    """

    job: str
    address: str | None = None
    head: str | None = None
    directory: str | None = None
    config_dir: str | None = None

    @property
    def where(self) -> str:
        return self.head or self.address or ""

    def write(self, run: RunDirectory, **more: Any) -> None:
        """Write remote.json and the user's record of the run.

        Args:
            more: other fields of the record.

        Raises:
            RunError: the state directory cannot be written.
        """
        user_state.save(run, place=asdict(self), **more)
        write_json(run.path / REMOTE, asdict(self))


def location_of(run: RunDirectory) -> RunLocation | None:
    """Return the confirmed location of a remote run; None for a local run, or one that this user did not submit."""
    return None if why_not_confirmed(run) else _recorded(run)


def required_location(run: RunDirectory) -> RunLocation:
    """Return the location of a remote run. Raises RunError if this user's record does not confirm it."""
    if why := why_not_confirmed(run):
        raise RunError(why)
    place = _recorded(run)
    assert place is not None
    return place


def why_not_confirmed(run: RunDirectory) -> str | None:
    """Return the reason why the location in remote.json is not used; None if the user's record confirms it."""
    recorded, stated = _recorded(run), _stated(run)
    if recorded is not None and stated == asdict(recorded):
        return None
    address = stated.get("address")
    remedy = f", or add cluster.address={address} if that is your cluster" if address else ""
    return (
        f'According to its file {REMOTE}, the run "{run.name}" was submitted to a cluster, but '
        f"{user_state.directory()} has no record of it, and a file must not choose where a token is sent. Follow the "
        f"run as the user and on the machine that submitted it{remedy}."
    )


def confirm(run: RunDirectory, address: str, token: str | None) -> None:
    """Record that a run is on the cluster at this URL, which the user has named on the command line.

    Raises:
        RunError: the run was submitted to another cluster.
    """
    stated = _stated(run)
    if stated.get("address") != address.rstrip("/") or not isinstance(stated.get("job"), str):
        raise RunError(f'The run "{run.name}" was not submitted to {address}. Remove cluster.address.')
    fields_of_record = {} if location_of(run) else {"place": asdict(RunLocation(stated["job"], address.rstrip("/")))}
    user_state.save(run, token=token and user_state.fingerprint(token), **fields_of_record)


def _stated(run: RunDirectory) -> dict[str, Any]:
    """Return the content of remote.json, which is not trusted; empty if it is not a JSON object."""
    with suppress(OSError, ValueError):
        content = read_json(run.path / REMOTE)
        return content if isinstance(content, dict) else {}
    return {}


def _recorded(run: RunDirectory) -> RunLocation | None:
    record = user_state.lookup(run)
    with suppress(TypeError):
        known = {each.name for each in fields(RunLocation)}
        if record is not None and record.place is not None:
            return RunLocation(**{key: value for key, value in record.place.items() if key in known})
    return None


def forget(run: RunDirectory, made: list[Path]) -> None:
    """Remove the record and the files of a run that never started, and the directories `made` that it created."""
    user_state.forget(run)
    (run.path / REMOTE).unlink(missing_ok=True)
    for path in made:
        with suppress(OSError):
            path.rmdir()
