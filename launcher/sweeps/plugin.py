"""Hydra makes the sweeper of `-m`, from a `hydra.sweeper` that has been judged."""

from __future__ import annotations

from typing import Any

from launcher.sweeps.observer import SweepObserver
from launcher.sweeps.planning import SweepPlan


def sweeper(sweep_plan: SweepPlan, observer: SweepObserver) -> Any:
    """Return Hydra's sweeper (`hydra.plugins.sweeper.Sweeper`) for a sweep that is sweep_plan."""
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    node = {"sweeper": sweep_plan.spec.first.sweeper, "runtime": {"config_sources": []}}
    plugin: Any = Plugins.instance().instantiate_sweeper(
        hydra_context=None,  # type: ignore[arg-type]  # its loader and callbacks would act on what files say
        task_function=lambda _: None,
        config=OmegaConf.create({"hydra": node}),
    )
    plugin.take(sweep_plan, observer)
    return plugin
