"""What TensorBoard reads from the event files of a run root, changed where it would show several sweeps wrongly.

`NaturalNames` changes the names of runs, so that trials are sorted by number. `HParams` is the plugin of that tab, with
the columns of all sweeps. Importing this module imports TensorBoard.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from tensorboard.data import provider
from tensorboard.plugins.hparams import backend_context, hparams_plugin, metadata
from tensorboard.plugins.hparams.api_pb2 import Experiment
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

_DIGITS = 3
_NUMBER = re.compile(r"(?:^|(?<=/))\d+$")
_START = metadata.SESSION_START_INFO_TAG
Content = dict[str, dict[str, bytes]]  # run -> tag -> data of the HParams plugin


def displayed_name(run: str) -> str:
    """Return the name of a run in TensorBoard: the number of a trial has three digits, since names sort as text."""
    return _NUMBER.sub(lambda number: number[0].zfill(_DIGITS), run)


def _by_run(method: str) -> Callable[..., Any]:
    """Return a method of `NaturalNames` that returns {run: series} of the inner provider's method."""

    def read(self: NaturalNames, ctx: Any = None, *, run_tag_filter: Any = None, **options: Any) -> dict[str, Any]:
        if run_tag_filter is not None and run_tag_filter.runs is not None:
            names = self.recorded_names(run_tag_filter.runs, ctx, options["experiment_id"])
            run_tag_filter = provider.RunTagFilter(names, run_tag_filter.tags)
        found = getattr(self.inner, method)(ctx, run_tag_filter=run_tag_filter, **options)
        return {displayed_name(run): series for run, series in (found or {}).items()}

    return read


class NaturalNames(provider.DataProvider):
    """Gives runs the names of `displayed_name`, and returns the data of `inner` otherwise."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self._recorded: dict[str, str] = {}  # displayed name -> name in the run root

    def recorded_names(self, displayed: Iterable[str], ctx: Any, experiment_id: str) -> list[str]:
        """Return the names in the run root of runs with these displayed names."""
        if not self._recorded.keys() >= set(displayed):
            self.list_runs(ctx, experiment_id=experiment_id)
        return [self._recorded.get(name, name) for name in displayed]

    def list_runs(self, ctx: Any = None, *, experiment_id: str) -> list[Any]:
        found = self.inner.list_runs(ctx, experiment_id=experiment_id)
        self._recorded = {displayed_name(run.run_name): run.run_name for run in found}
        names = {run.run_name: displayed_name(run.run_name) for run in found}
        return [provider.Run(names[run.run_name], names[run.run_name], run.start_time) for run in found]

    list_scalars = _by_run("list_scalars")
    read_scalars = _by_run("read_scalars")
    read_last_scalars = _by_run("read_last_scalars")
    list_tensors = _by_run("list_tensors")
    read_tensors = _by_run("read_tensors")
    list_blob_sequences = _by_run("list_blob_sequences")
    read_blob_sequences = _by_run("read_blob_sequences")

    def experiment_metadata(self, ctx: Any = None, **options: Any) -> Any:
        return self.inner.experiment_metadata(ctx, **options)

    def list_plugins(self, ctx: Any = None, **options: Any) -> Any:
        return self.inner.list_plugins(ctx, **options)

    def read_blob(self, ctx: Any = None, **options: Any) -> Any:
        return self.inner.read_blob(ctx, **options)


class _Columns(backend_context.Context):
    """The data of the HParams tab over all runs, not over the experiment summary of one of them."""

    def hparams_metadata(self, ctx: Any, experiment_id: str, run_tag_filter: Any = None) -> Content:
        return with_one_type_per_key(super().hparams_metadata(ctx, experiment_id, run_tag_filter))

    def experiment_from_metadata(
        self,
        ctx: Any,
        experiment_id: str,
        include_metrics: bool,
        hparams_run_to_tag_to_content: Content,
        data_provider_hparams: Any,
        hparams_limit: int | None = None,
    ) -> Any:
        content = hparams_run_to_tag_to_content
        # TensorBoard would show only the keys of the first experiment summary that it finds.
        ours = {
            run: {tag: data for tag, data in tags.items() if tag != metadata.EXPERIMENT_TAG}
            for run, tags in content.items()
        }
        found = super().experiment_from_metadata(ctx, experiment_id, include_metrics, ours, data_provider_hparams)
        keys, objectives = first_columns(content)
        for info in found.hparam_infos:
            info.differs = info.differs or info.name in keys  # the page shows these first
            if info.HasField("domain_discrete"):  # the values of a text column, in no order
                info.domain_discrete.values.sort(key=lambda value: _natural(_text(value)))
        hparams = sorted(found.hparam_infos, key=lambda info: keys.get(info.name, len(keys)))
        metrics = sorted(found.metric_infos, key=lambda info: _metric_rank(info.name, objectives))
        return Experiment(hparam_infos=hparams[: hparams_limit or None], metric_infos=metrics)


class HParams(hparams_plugin.HParamsPlugin):
    """The plugin of the HParams tab: the swept keys of all sweeps and the objectives are its first columns."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self._context = _Columns(context)


def with_one_type_per_key(content: Content) -> Content:
    """Return the data of the HParams plugin in which the values of a key are text if some of them are.

    TensorBoard cannot sort a column of numbers and texts.
    """
    starts = {run: HParamsPluginData.FromString(tags[_START]) for run, tags in content.items() if _START in tags}
    types = defaultdict(set)
    for start in starts.values():
        for key, value in start.session_start_info.hparams.items():
            types[key].add(value.WhichOneof("kind"))
    mixed = {key for key, found in types.items() if len(found) > 1}
    changed = dict(content)
    for run, start in starts.items():
        values = start.session_start_info.hparams
        if affected := mixed & values.keys():
            for key in affected:
                values[key].string_value = _text(values[key])
            changed[run] = {**content[run], _START: start.SerializeToString()}
    return changed


def _text(value: Any) -> str:
    """Return a value as the sweep writes it in trials.csv: whole numbers without a point, false and true."""
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return str(int(number)) if number.is_integer() else repr(number)
    return str(value.bool_value).lower() if kind == "bool_value" else value.string_value


def _natural(text: str) -> tuple[bool, float, str]:
    """Return a sort key that places numbers by their value before other texts."""
    with suppress(ValueError):
        return False, float(text), text
    return True, 0.0, text


def first_columns(content: Content) -> tuple[dict[str, int], dict[str, int]]:
    """Return the ranks of the swept keys and of the objectives of all runs, those of the newest run first.

    A run of a sweep names its own in order, since the values of a run have no order.
    """
    keys: dict[str, int] = {}
    objectives: dict[str, int] = {}
    found = []
    for tags in content.values():
        entries = [HParamsPluginData.FromString(data) for data in tags.values()]
        started = max((entry.session_start_info.start_time_secs for entry in entries), default=0.0)
        found += [(started, entry.experiment) for entry in entries if entry.HasField("experiment")]
    for _, experiment in sorted(found, key=lambda pair: -pair[0]):
        for info in experiment.hparam_infos:
            keys.setdefault(info.name, len(keys))
        for info in experiment.metric_infos:
            objectives.setdefault(info.name.tag, len(objectives))
    return keys, objectives


_GROUPS = ("val/", "train/")


def _metric_rank(name: Any, objectives: dict[str, int]) -> tuple[int, int]:
    """Return the place of a metric among the columns: objectives, then validation, training, and all others."""
    group = next((rank for rank, prefix in enumerate(_GROUPS) if name.tag.startswith(prefix)), len(_GROUPS))
    return objectives.get(name.tag, len(objectives)), group
