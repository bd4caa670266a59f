"""Rejects Hydra's own settings that have no effect in launch, and names the settings to use instead.

Plain Python: no Hydra.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError

_INSTEAD = {
    "hydra/sweeper": "launch -m has its own sweeper, and sweep=grid, random, tpe, gp, cmaes or nsga2 selects it",
    "hydra.sweeper.n_trials": "sweep.trials sets the number of trials",
    "hydra.sweeper.n_jobs": "sweep.concurrency sets the number of trials at a time",
    "hydra.sweeper.direction": "sweep.direction, or checkpoint.mode, is the direction of the objective",
    "hydra.sweeper.study_name": "run.name is the name of the sweep",
    "hydra.sweeper.storage": "the study is stored in the directory of the sweep",
    "hydra.sweeper.sampler": "sweep=tpe, gp, cmaes, nsga2, random or grid selects the sampler",
    "hydra.sweeper.max_batch_size": "sweep.concurrency sets the number of trials at a time",
    "hydra.sweeper.search_space": "hydra.sweeper.params, or words such as optimizer.lr=interval(0.1,1), define it",
    "hydra/launcher": "cluster=NAME chooses where the trials run",
    "hydra.launcher": "cluster=NAME chooses where the trials run",
    "hydra.mode": "the flag -m runs a sweep",
    "hydra.run": "run.root and run.name set the directory of a run",
    "hydra.sweep": "run.root and run.name set the directory of a sweep",
    "hydra.output_subdir": "config.yaml and overrides.yaml are in the directory of the run",
    "hydra.verbose": "verbose=true shows more messages",
    "hydra.searchpath": "--config-dir DIR adds a directory of your own",
    "hydra.job.chdir": "the working directory is never changed",
    "hydra.job.name": "run.name is the name of the run",
    "hydra.job_logging": "log.txt in the directory of the run contains the output",
    "hydra.hydra_logging": "log.txt in the directory of the run contains the output",
    "hydra.callbacks": "callbacks are configured in the section callbacks",
}
# Values of ${hydra:NAME} that launch does not have.
_NO_VALUE = {
    "job.num": "the number of a trial is the name of its directory, and its columns are in trials.csv",
    "job.id": "run.name is the name of the run",
    "job.name": "run.name is the name of the run",
    "job.override_dirname": "the words of a run are in its overrides.yaml, and those of a trial in trials.csv",
    "runtime.output_dir": "the directory of a run is ${run.root}/${run.name}, and code of a job gets its directory",
    "run.dir": "run.root and run.name set the directory of a run",
    "sweep.dir": "run.root and run.name set the directory of a sweep",
    "sweep.subdir": "the directory of a trial is its number",
}
_ALLOWED = "hydra.sweeper.params"


def explain(key: str) -> str:
    """Return what to use instead of a setting of Hydra, as the end of an error message."""
    parts = key.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((_INSTEAD[name] for name in above if name in _INSTEAD), "launch uses Hydra for composition only")


def check_file(content: Any, defaults: Any, file: Path | str) -> None:
    """Check the settings of Hydra in a configuration file.

    Args:
        content: the section `hydra` as plain data, or None.
        defaults: the defaults list as plain data, or None.
        file: the file, for the message.

    Raises:
        ConfigError: the file sets something that has no effect. A `_target_` has an error of its own.
    """
    chosen = [
        group
        for item in (defaults if isinstance(defaults, list) else [])
        for name, option in (item.items() if isinstance(item, Mapping) else [])
        if (group := str(name).split()[-1].lstrip("/")).startswith("hydra/")
        and (group, option) != ("hydra/sweeper", "launch")
    ]
    keys = list(_keys(content, "hydra"))
    if any(key.endswith("._target_") for key in keys):
        return
    for key in [*chosen, *keys]:
        raise ConfigError(f"{file}: {key} has no effect: {explain(key)}. Remove it.", key=key)


def check_reference(name: str) -> None:
    """Check the name in an interpolation `${hydra:NAME}`.

    Raises:
        ValueError: launch has no such value. OmegaConf reports it with the key.
    """
    for prefix, remedy in _NO_VALUE.items():
        if name == prefix or name.startswith(f"{prefix}."):
            raise ValueError(f"${{hydra:{name}}} has no value in launch: {remedy}")


def _keys(content: Any, at: str) -> Iterator[str]:
    """Yield the dotted keys of values in a section, except those with an effect."""
    if at == _ALLOWED or at == "hydra.job.env_copy":  # the latter has an error of its own
        return
    if not isinstance(content, Mapping) or (not content and at != "hydra"):
        if content is not None or at != "hydra":
            yield at
        return
    for key, value in content.items():
        yield from _keys(value, f"{at}.{key}")
