"""The way to the Ray Jobs API of the cluster on which a run is driven."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from launcher.clusters.ray_jobs import Jobs, checked_url, own_token
from launcher.remote.place import Place


@contextmanager
def connected(place: Place) -> Iterator[Jobs]:
    """Yield the Ray Jobs API of a run's cluster.

    Raises:
        ClusterError: it cannot be reached.
    """
    assert place.address is not None
    yield Jobs(checked_url(place.address), own_token())
