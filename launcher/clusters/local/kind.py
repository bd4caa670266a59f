"""The kind `local`: a Ray on this machine, started for the command."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.clusters import capacity
from launcher.clusters.base import ClusterKind, Machines, Report, Session, Use
from launcher.clusters.local import ray_session
from launcher.config.checks import at_least
from launcher.config.schema import ClusterConfig
from launcher.errors import MachineError
from launcher.formatting import count, duration

if TYPE_CHECKING:
    from launcher.clusters.local.embedded_ray import EmbeddedRay


@dataclass
class LocalCluster(ClusterConfig):
    kind: str = "local"
    keep_minutes: float = 0.0  # how long an idle Ray is kept for the next command


class Local(ClusterKind):
    name = "local"
    config = LocalCluster
    is_default = True
    on_this_machine = True
    free_keys = ("keep_minutes",)

    def check(self, cluster: LocalCluster) -> None:
        at_least("cluster.keep_minutes", cluster.keep_minutes, 0)

    def machines(self, cluster: ClusterConfig) -> Machines:
        where = "the Ray of this session" if capacity.connected() else "this machine"
        return Machines([capacity.this_machine()], where, is_this_machine=True)

    def connect(self, cluster: ClusterConfig, use: Use) -> AbstractContextManager[EmbeddedRay]:
        from launcher.clusters.local.embedded_ray import EmbeddedRay

        assert isinstance(cluster, LocalCluster)
        minutes = cluster.keep_minutes
        if minutes and (use.verbose or use.is_sweep):
            what = "a sweep" if use.is_sweep else "verbose=true, which prints the messages of its own Ray"
            use.report(f"cluster.keep_minutes={minutes:g} has no effect with {what}.")
            minutes = 0.0
        return EmbeddedRay(verbose=use.verbose, preload=(use.preload,), keep_minutes=minutes)

    def session(self) -> Session | None:
        kept = ray_session.current()
        return None if kept is None else LocalSession(kept)


class LocalSession:
    """The Ray on this machine that `cluster.keep_minutes` keeps, for `launch status` and `launch down`."""

    def __init__(self, kept: ray_session.RaySession) -> None:
        self._kept = kept

    def facts(self) -> dict[str, Any]:
        kept = self._kept
        return {
            "name": KIND.name,
            "kind": KIND.name,
            "address": kept.address,
            "cpus": kept.cpus,
            "gpus": kept.gpus,
            "state": "in use" if ray_session.in_use() else "idle",
            "seconds": round(time.time() - kept.since, 1),
            "keep_minutes": ray_session.idle_minutes(),
            "usd_per_hour": 0.0,
        }

    def text(self) -> str:
        one = self.facts()
        return (
            f"{one['name']}  {one['state']}  {count(one['cpus'], 'CPU')}, {count(one['gpus'], 'GPU')}  up for "
            f"{duration(one['seconds'])}, ends after {count(one['keep_minutes'], 'idle minute')}  "
            f"{one['usd_per_hour']:.2f} USD/h  `launch down` ends it now"
        )

    def end(self, report: Report) -> None:
        if not ray_session.end(self._kept):
            raise MachineError(
                f"Some processes of the kept Ray could not be killed within 30 s. Find them by {self._kept.marker} in "
                "their environment."
            )
        report("Stopped the Ray that was kept on this machine.")


KIND = Local()
