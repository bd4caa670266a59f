"""`hydra/sweeper=launch`: the sweeper that Hydra makes for `-m`. A thin shell around `launcher.sweeps`.

Hydra looks for plugins in a namespace package of this very name, so this folder has no `__init__.py` and its parent is
put on `sys.path` (`launcher/__init__.py`). Heavy imports wait until a sweep runs: Hydra imports every plugin at its
start, and before `sys.modules` knows it, so that annotations are no strings here (dataclasses would look them up).
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
    """`hydra.sweeper`. params: key -> what it is swept over, as on the command line. The rest stands under `sweep`."""

    _target_: str = "hydra_plugins.launch_sweeper.LaunchSweeper"
    params: dict[str, Any] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="launch", node=LaunchSweeperConf, provider="launch")


class LaunchSweeper(Sweeper):
    """Runs sweeps with Optuna's search over warm groups of Ray Train workers.

    `launch -m` hands it a sweep that is sweep_plan already (`take`). Under another program's `hydra.main` the
    configuration directory is that program's, and what runs is the `launch` job in it: the program's own function is
    not called, since a trial lives in worker processes.
    """

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self._params = dict(params or {})
        self._config_dir: Path | None = None
        self._taken: Any = None

    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        sources = config.hydra.runtime.config_sources
        self._config_dir = next((Path(s.path) for s in sources if s.provider == "main" and s.schema == "file"), None)

    def take(self, sweep_plan: "SweepPlan", observer: "SweepObserver") -> None:
        """Run this sweep, and tell this observer of it."""
        self._taken = (sweep_plan, observer)

    def sweep(self, arguments: list[str]) -> "SweepOutcome":
        """Run the sweep that the words ask for, to its end or until somebody stops it.

        Raises:
            RequestError: it cannot be done as asked; nothing was started.
            Stopped: it was ended at once by a signal.
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
