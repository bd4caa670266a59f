"""TensorBoard's event file: images, the graph of the network and the HParams tab, beside PyTorch's own functions.

Importing this module imports TensorBoard, which takes about a second.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Experiment, HParamInfo, MetricInfo, MetricName, Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard._pytorch_graph import graph

from launcher.engine.drawing import quietly

_FORMS = (
    "an example is an image (a tensor (C, H, W) or (N, C, H, W) of bytes or of floats from 0 to 1, with 1 or 3 "
    "channels), audio (a pair of a float tensor (T,) and its sample rate), a text, or a matplotlib figure"
)
_COLUMNS_TAG = "_hparams_/launch_columns"
_GAP = 2  # pixels between the images of a grid


class EventFile:
    """Writes one event file.

    Args:
        purge_step: TensorBoard drops earlier values from this step on, after a resume; None for a new run.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=30)
        self._file: Any = self._writer.file_writer
        self._has_hyperparameters = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text in Markdown."""
        self._writer.add_text(tag, text, step)

    def figures(self, values: Mapping[str, Any], step: int) -> None:
        """Show images, audio, text and figures, by their type.

        An image is a tensor (C, H, W), several are (N, C, H, W), with one or three channels: bytes, or floats between 0
        (black) and 1. Audio is a pair of a float tensor (T,) between -1 and 1 and its samples per second. Text is
        Markdown. A figure is a matplotlib figure.

        Raises:
            ValueError: a value has none of these types.
        """
        for tag, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(tag, value, step)
            elif isinstance(value, torch.Tensor):
                self._writer.add_image(tag, _pixels(tag, value), step, dataformats="HWC")
            elif isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], torch.Tensor):
                self._writer.add_audio(tag, _sound(tag, *value), step, sample_rate=int(value[1]))
            elif callable(getattr(value, "savefig", None)):
                self._figure(tag, value, step)
            else:
                raise ValueError(f"{tag} is a {type(value).__name__}; {_FORMS}")
        self._writer.flush()

    def _figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a figure as PNG. PyTorch's `add_figure` would import pyplot, with its global state and windows."""
        file = io.BytesIO()
        figure.savefig(file, format="png")
        png = file.getvalue()
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # in the first chunk of a PNG
        picture = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._file.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    def layout(self, names: Iterable[str]) -> None:
        """Write the layout of the Custom Scalars tab: a chart for each name, of training and validation together."""
        charts = {name: ["Multiline", [f"(train|val)(/.+)?/{re.escape(name)}$"]] for name in names}
        self._writer.add_custom_scalars({"training and validation": charts})

    def hyperparameters(self, values: Mapping[str, Any], objectives: Sequence[str] = ()) -> None:
        """Write the entry of the HParams tab into this event file; `add_hparams` would create another run.

        The order of the keys, and the objectives, are written under a tag that only `launch board` reads. A summary of
        the experiment under TensorBoard's own tag would hide the keys of all other sweeps of the run root.
        """
        start = SessionStartInfo(start_time_secs=time.time())
        for key, value in values.items():
            if isinstance(value, bool):
                start.hparams[key].bool_value = value
            elif isinstance(value, (int, float)):
                start.hparams[key].number_value = value
            else:  # None is written as text, because TensorBoard hides runs with a null value
                start.hparams[key].string_value = "null" if value is None else str(value)
        self._has_hyperparameters = True
        self._hparams(metadata.SESSION_START_INFO_TAG, session_start_info=start)
        metrics = [MetricInfo(name=MetricName(tag=tag)) for tag in objectives]
        columns = Experiment(hparam_infos=[HParamInfo(name=key) for key in values], metric_infos=metrics)
        self._hparams(_COLUMNS_TAG, experiment=columns)

    def _hparams(self, tag: str, **content: Any) -> None:
        data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data)
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
        self._file.add_summary(Summary(value=[value]))

    def graph(self, traced: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        """Write the graph of a network that `drawing.traced_step` has traced, if torch can convert it."""
        with warnings.catch_warnings(), quietly(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            self._file.add_graph(graph(traced, arguments))  # tracing a traced network returns it unchanged

    def close(self, ended_well: bool) -> None:
        """Write the end of the session and close the file."""
        if self._has_hyperparameters:
            status = Status.Value("STATUS_SUCCESS" if ended_well else "STATUS_FAILURE")
            end = SessionEndInfo(status=status, end_time_secs=time.time())
            self._hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end)
        self._writer.close()


def _pixels(tag: str, value: torch.Tensor) -> np.ndarray:
    """Return one image, or a grid of several, as bytes (H, W, 3)."""
    many = value.detach().cpu()
    many = many[None] if many.ndim == 3 else many
    bytes_ = many.dtype == torch.uint8
    if many.ndim != 4 or many.shape[1] not in (1, 3) or not many.numel() or not (bytes_ or many.is_floating_point()):
        found = f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
        raise ValueError(f"{tag} is {found}; {_FORMS}")
    if not bytes_:
        many = (many.float().nan_to_num().clamp(0, 1) * 255).round().byte()
    count, _, height, width = many.shape
    columns = min(8, count)
    rows = -(-count // columns)
    grid = torch.zeros(3, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, dtype=torch.uint8)
    for number, picture in enumerate(many):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        grid[:, top : top + height, left : left + width] = picture
    return grid.permute(1, 2, 0).numpy()


def _sound(tag: str, wave: torch.Tensor, rate: Any) -> torch.Tensor:
    """Return audio as a float32 tensor (1, T) on the CPU."""
    if wave.ndim != 1 or not wave.numel() or not wave.is_floating_point() or not float(rate) >= 1:
        raise ValueError(f"{tag} is audio {tuple(wave.shape)} of {wave.dtype} at {rate} samples a second; {_FORMS}")
    return wave.detach().float().cpu().nan_to_num().clamp(-1, 1)[None]
