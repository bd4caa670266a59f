"""The way to the Ray Jobs API of the cluster on which a run is driven."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.clusters import heads
from launcher.clusters.heads import Head
from launcher.clusters.ray_jobs import Jobs, checked_url, own_token
from launcher.jobs.remote.place import Place


@contextmanager
def connected(place: Place) -> Iterator[Jobs]:
    """Yield the Ray Jobs API of a run's cluster; through a tunnel where the cluster is known by its head.

    Raises:
        ClusterError: it cannot be reached, or nobody knows a cluster of this name any more.
    """
    if place.head is not None:
        with through(heads.load(place.head)) as jobs:
            yield jobs
        return
    assert place.address is not None
    yield Jobs(checked_url(place.address), own_token())


@contextmanager
def through(head: Head) -> Iterator[Jobs]:
    """Yield the Ray Jobs API of a head, through an SSH tunnel. The token is read there, and kept in memory."""
    shell = head.shell()
    place = f"{shlex.quote(head.directory)}/token"
    script = f"cat {place} 2>/dev/null || cat ~/.ray/auth_token"  # hosts of ours, or VMs that Ray's provider made
    token = shell.run(script, what="reading the cluster's token").strip()
    with shell.tunnel(head.dashboard) as port:
        yield Jobs(f"http://127.0.0.1:{port}", token)
