"""The way to the Ray Jobs API of the cluster on which a run is driven."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.clusters.remote import registry
from launcher.clusters.remote.ray_jobs import Jobs, checked_url, own_token
from launcher.clusters.remote.registry import Head
from launcher.errors import ClusterError
from launcher.jobs.remote.location import required_location
from launcher.runs import RunDirectory, user_state


@contextmanager
def connected(run: RunDirectory) -> Iterator[Jobs]:
    """Yield the Ray Jobs API of a run's cluster; through a tunnel where the cluster is known by its head.

    Raises:
        ClusterError: it cannot be reached, its head is not known any more, or this environment has another token.
        RunError: this user's record does not confirm where the run was sent.
    """
    place = required_location(run)
    if place.head is not None:
        with through(registry.load(place.head)) as jobs:
            yield jobs
        return
    assert place.address is not None
    yield Jobs(checked_url(place.address), _token_for(run, place.address))


def _token_for(run: RunDirectory, address: str) -> str | None:
    """Return the token for the cluster that a run was sent to: the one it was sent with, and no other."""
    record, token = user_state.lookup(run), own_token()
    if record is None or record.token is None or token is None:  # the cluster asked for none, or there is none
        return None
    if user_state.fingerprint(token) != record.token:
        raise ClusterError(
            f'"{run.name}" was sent to {address} with another token than this environment has now, and a token is sent '
            "only to the cluster that it was given for. Set RAY_AUTH_TOKEN to the token of that cluster; if this is "
            f"its new token, confirm it by adding cluster.address={address} to launch logs or launch stop."
        )
    return token


@contextmanager
def through(head: Head) -> Iterator[Jobs]:
    """Yield the Ray Jobs API of a head, through an SSH tunnel. The token is read there, and kept in memory."""
    shell = head.shell()
    place = f"{shlex.quote(head.directory)}/token"
    script = f"cat {place} 2>/dev/null || cat ~/.ray/auth_token"  # hosts of ours, or VMs that Ray's provider made
    token = shell.run(script, what="reading the cluster's token").strip()
    with shell.tunnel(head.dashboard) as port:
        yield Jobs(f"http://127.0.0.1:{port}", token)
