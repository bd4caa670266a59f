"""Where the trials of a sweep run: warm groups of Ray Train workers, or this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from launcher.clusters import base
from launcher.runners.signals import Interrupts
from launcher.runners.tasks import Shape, TaskOutcome
from launcher.sweeps.observer import SweepObserver
from launcher.sweeps.planning import SweepPlan


class Runner(Protocol):
    """Runs trials: `runners.groups.Groups` or `runners.sequential.Sequential`."""

    @property
    def running(self) -> set[str]: ...
    def ready(self, shape: Shape) -> bool: ...
    def submit(self, key: str, task: Any, shape: Shape) -> None: ...
    def request(self, key: str, what: str) -> None: ...
    def poll(self) -> list[TaskOutcome]: ...
    def release(self) -> None: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


@contextmanager
def open_runner(
    sweep_plan: SweepPlan, observer: SweepObserver, on_event: Callable[[str, dict[str, Any]], None]
) -> Iterator[tuple[Runner, Interrupts]]:
    """Connect to the cluster of a sweep, and yield its runner and the signals of this process.

    Args:
        on_event: called with the key of a trial and an event of its workers.
    """
    spec = sweep_plan.spec
    if sweep_plan.plan.machines.in_process:
        from launcher.runners.sequential import Sequential  # imports torch

        with Interrupts() as interrupts:
            yield Sequential(interrupts, on_event), interrupts
        return
    observer.event({"kind": "phase", "name": "ray"})
    calling, verbose = [str(spec.request.calling)], "verbose=true" in spec.space.fixed
    use = base.Use(
        python_path=calling,
        directory=spec.task_directory(spec.directory),
        verbose=verbose,
        preload="launcher.runners.groups",
        is_sweep=True,
        report=observer.say,
    )
    connection = base.kind_of(spec.cluster).connect(spec.cluster, use)
    with Interrupts() as interrupts, connection as cluster:
        from launcher.runners.groups import Groups  # imports Ray

        groups = Groups(cluster, on_event, spec.settings.concurrency)
        try:
            yield groups, interrupts
        finally:
            groups.close()
