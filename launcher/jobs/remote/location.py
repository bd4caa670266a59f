"""Where a run was sent: its cluster and its job there, in remote.json of the run and in the user's state directory.

remote.json tells everyone who reads the run's directory that the run is elsewhere. A command connects only to what the
record in the state directory (`launcher.runs.user_state`) confirms, since a run's directory may come from a stranger.
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
    """Whether a run with this section is driven by the head of a cluster, not by the command itself."""
    return kind_of(cluster).is_remote(cluster)


@dataclass(frozen=True)
class RunLocation:
    """Where a run is driven.

    Attributes:
        job: its id in Ray Jobs.
        address: URL of the cluster's Ray Jobs API; None where the cluster is known by its head.
        head: the cluster's name (`launcher.clusters.remote.registry`), or None.
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

    def write(self, run: RunDirectory, **more: Any) -> None:
        """Write remote.json, and record the place for this user. more: other fields of the record.

        Raises:
            RunError: the state directory cannot be written.
        """
        user_state.save(run, place=asdict(self), **more)
        write_json(run.path / REMOTE, asdict(self))


def location_of(run: RunDirectory) -> RunLocation | None:
    """Return where a run is driven, or was; None for one that was driven here, or that this user did not send."""
    return None if why_not_confirmed(run) else _recorded(run)


def required_location(run: RunDirectory) -> RunLocation:
    """Return where a run that was sent is driven. RunError where this user's record does not confirm it."""
    if why := why_not_confirmed(run):
        raise RunError(why)
    place = _recorded(run)
    assert place is not None
    return place


def why_not_confirmed(run: RunDirectory) -> str | None:
    """Return the reason why what remote.json says of a run is not used; None where the record confirms it."""
    recorded, stated = _recorded(run), _stated(run)
    if recorded is not None and stated == asdict(recorded):
        return None
    address = stated.get("address")
    cure = f", or add cluster.address={address} if that is a cluster of yours" if address else ""
    return (
        f'The file {REMOTE} says that the run "{run.name}" was sent to a cluster, but {user_state.directory()} has no '
        "record of it, and a token is not sent where a file says. Follow the run as the user and on the machine that "
        f"sent it{cure}."
    )


def confirm(run: RunDirectory, address: str, token: str | None) -> None:
    """Record that a run is on the cluster at this URL, which the user has named on the command line.

    Raises:
        RunError: the run was not sent there.
    """
    stated = _stated(run)
    if stated.get("address") != address.rstrip("/") or not isinstance(stated.get("job"), str):
        raise RunError(f'The run "{run.name}" was not sent to {address}. Leave cluster.address out.')
    fields_of_record = {} if location_of(run) else {"place": asdict(RunLocation(stated["job"], address.rstrip("/")))}
    user_state.save(run, token=token and user_state.fingerprint(token), **fields_of_record)


def _stated(run: RunDirectory) -> dict[str, Any]:
    """Return what remote.json says, which may be anything."""
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
    """Take back what was written for a run that never began; `made` are the directories that were made for it."""
    user_state.forget(run)
    (run.path / REMOTE).unlink(missing_ok=True)
    for path in made:
        with suppress(OSError):
            path.rmdir()
