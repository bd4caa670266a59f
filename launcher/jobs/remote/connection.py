"""Connects to the Ray Jobs API of the cluster on which a run's driver runs."""

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
    """Yield the Ray Jobs API of a run's cluster, through an SSH tunnel if the cluster has a recorded head.

    Raises:
        ClusterError: the cluster is unreachable or was removed, or this environment has another token.
        RunError: this user's record does not confirm the run's location.
    """
    place = required_location(run)
    if place.head is not None:
        with through(registry.load(place.head)) as jobs:
            yield jobs
        return
    assert place.address is not None
    yield Jobs(checked_url(place.address), _token_for(run, place.address))


def _token_for(run: RunDirectory, address: str) -> str | None:
    """Return the token for the cluster of a run. It must be the token with which the run was submitted."""
    record, token = user_state.lookup(run), own_token()
    if record is None or record.token is None or token is None:  # the cluster required none, or there is none
        return None
    if user_state.fingerprint(token) != record.token:
        raise ClusterError(
            f'"{run.name}" was submitted to {address} with a token other than the one in this environment, and a token '
            "is only sent to the cluster that it belongs to. Set RAY_AUTH_TOKEN to the token of that cluster. If this "
            f"is its new token, confirm it by adding cluster.address={address} to launch logs or launch stop."
        )
    return token


@contextmanager
def through(head: Head) -> Iterator[Jobs]:
    """Yield the Ray Jobs API of a head through an SSH tunnel. The token is read from the head, and kept in memory."""
    shell = head.shell()
    place = f"{shlex.quote(head.directory)}/token"
    script = f"cat {place} 2>/dev/null || cat ~/.ray/auth_token"  # cluster=ssh, or VMs of Ray's node provider
    token = shell.run(script, what="reading the cluster's token").strip()
    with shell.tunnel(head.dashboard) as port:
        yield Jobs(f"http://127.0.0.1:{port}", token)
