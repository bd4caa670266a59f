"""Create Hydra's sweeper for `launch -m` from a `hydra.sweeper` that was checked."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from launcher.sweeps.observer import SweepObserver
from launcher.sweeps.planning import SweepPlan


def sweeper(sweep_plan: SweepPlan, observer: SweepObserver) -> Any:
    """Return Hydra's sweeper (`hydra.plugins.sweeper.Sweeper`) for a planned sweep."""
    node = {"sweeper": sweep_plan.spec.first.sweeper, "runtime": {"config_sources": []}}
    plugin: Any = Plugins.instance().instantiate_sweeper(
        hydra_context=None,  # type: ignore[arg-type]  # its loader and callbacks would use unchecked configuration
        task_function=lambda _: None,
        config=OmegaConf.create({"hydra": node}),
    )
    plugin.take(sweep_plan, observer)
    return plugin
