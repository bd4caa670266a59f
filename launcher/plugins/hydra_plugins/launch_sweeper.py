"""The Hydra sweeper plugin `hydra/sweeper=launch`, which Hydra uses for `-m`. A thin layer over `launcher.sweeps`.

Hydra looks for plugins in the namespace package `hydra_plugins`, so this folder has no `__init__.py` and its parent is
added to `sys.path` (`launcher/__init__.py`). Hydra imports all plugins at its start, so heavy modules are imported when
a sweep runs. It does so before the module is in `sys.modules`, where dataclasses would look up string annotations;
so `from __future__ import annotations` is not used.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from launcher.sweeps.observer import SweepObserver, SweepOutcome
    from launcher.sweeps.planning import SweepPlan


@dataclass
class LaunchSweeperConf:
    """The node `hydra.sweeper`. params: key -> its values, as on the command line. Other settings are under `sweep`."""

    _target_: str = "hydra_plugins.launch_sweeper.LaunchSweeper"
    params: dict[str, Any] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="launch", node=LaunchSweeperConf, provider="launch")


class LaunchSweeper(Sweeper):
    """Runs sweeps with Optuna's search over warm groups of Ray Train workers.

    `launch -m` passes it a sweep that is planned already (`take`). Under another program's `hydra.main`, the
    configuration directory is that program's, and each trial is the `launch` job described there; the program's own
    function is not called, because trials run in worker processes.
    """

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self._params = dict(params or {})
        self._config_dir: Path | None = None
        self._taken: Any = None

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        sources = config.hydra.runtime.config_sources
        self._config_dir = next((Path(s.path) for s in sources if s.provider == "main" and s.schema == "file"), None)

    def take(self, sweep_plan: "SweepPlan", observer: "SweepObserver") -> None:
        """Use this plan and observer in the next call of `sweep`."""
        self._taken = (sweep_plan, observer)

    def sweep(self, arguments: list[str]) -> "SweepOutcome":
        """Run the sweep that the overrides describe, until it ends or is stopped.

        Raises:
            RequestError: the request is invalid or cannot be met; nothing was started.
            Stopped: a signal ended the sweep immediately.
        """
        from launcher.sweeps import api as sweeps

        if self._taken is not None:
            return sweeps.drive(*self._taken)
        from launcher.cli.sweep_display import SweepDisplay, conclusion
        from launcher.jobs.prepare import Request

        with SweepDisplay() as display:
            outcome = sweeps.run(Request([*sweeps.as_words(self._params), *arguments], self._config_dir), display)
            for text in [] if display.finished else conclusion(outcome):
                display.say(text)
        return outcome
