"""Uses trained weights in one process: predicts inputs, and exports the network for other programs."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from launcher.config import Job
from launcher.engine import checkpoint
from launcher.engine.build import build_data, build_model, converter
from launcher.engine.control import Control
from launcher.engine.data import Loader
from launcher.engine.datasets import Data
from launcher.engine.fetch import Fetch
from launcher.engine.order import keys_of_evaluation
from launcher.engine.runtime import Runtime
from launcher.engine.start_check import call_user_step
from launcher.engine.strategies.strategy import DTYPES
from launcher.engine.weights import load_weights_into
from launcher.errors import ConfigError, DataError, ExportError, UserCodeError

_MAX_BATCH = 64  # inputs per batch of predictions
_EXPORT_SAMPLES = 3  # of the example batch of an export; torch.export specialises for batches of 0 and 1


def load_trained(job: Job, runtime: Runtime, weights: str) -> tuple[Data, nn.Module]:
    """Return the data and the network with its weights, in evaluation mode."""
    data = build_data(job)
    model = build_model(job, runtime)
    load_weights_into(model, checkpoint.load_weights(weights), weights)
    return data, model.eval()


def _cast(job: Job, runtime: Runtime) -> AbstractContextManager[Any]:
    dtype = DTYPES[job.trainer.precision]
    return nullcontext() if dtype is torch.float32 else torch.autocast(runtime.device.type, dtype=dtype)


# ---- predicting -----------------------------------------------------------------------------------------------------


def predict(job: Job, runtime: Runtime, control: Control, weights: str, path: str) -> None:
    """Emit an event `prediction` for every input that the job's data finds at `path`, in order.

    Raises:
        ConfigError: the data cannot read inputs, the model cannot predict, or the model rejects an input.
        DataError: no input was found, or an input is damaged; has the message of the data.
        UserCodeError: `predict_step` raised an exception, or did not return one JSON value per input.
    """
    data, model = load_trained(job, runtime, weights)
    if not callable(getattr(model, "predict_step", None)):
        raise ConfigError(
            f"model._target_={job.model['_target_']} has no method predict_step(batch), which returns one JSON value "
            "per input. Add it (see docs/extending.md).",
            key="model._target_",
        )
    dataset, collate = inputs_of(job, data, path)
    names = [str(name) for name in getattr(dataset, "names", None) or range(len(dataset))]
    step = min(job.trainer.microbatch_size or job.trainer.global_batch_size, _MAX_BATCH)
    spans = [(start, min(start + step, len(dataset))) for start in range(0, len(dataset), step)]
    fetch = Fetch(dataset, collate, job.trainer.seed, name="the inputs")
    loader = Loader(fetch, runtime.device, data.num_workers, converter(model))
    with torch.no_grad():
        keys = keys_of_evaluation(torch.arange(len(dataset)), spans)
        for (start, stop), batch in zip(spans, loader.read(keys), strict=True):
            with _cast(job, runtime):
                answer = call_user_step(model.predict_step, batch)
            if not isinstance(answer, Sequence) or isinstance(answer, str) or len(answer) != stop - start:
                found = f"{len(answer)}" if isinstance(answer, Sequence) else f"a {type(answer).__name__}"
                raise UserCodeError(
                    f"predict_step must return a list of one value for each of its {stop - start} inputs; found "
                    f"{found}.",
                    "",
                )
            for name, value in zip(names[start:stop], answer, strict=True):
                output = plain(value)
                output = output if isinstance(output, dict) else {"prediction": output}
                control.emit({"kind": "prediction", "value": {"input": name, **output}})


def inputs_of(job: Job, data: Data, path: str) -> tuple[Any, Any]:
    """Return the inputs at `path` as a data set, and the function that collates them."""
    read = getattr(data.source, "inputs", None)
    if not callable(read):
        raise ConfigError(
            f"data._target_={job.data['_target_']} cannot read inputs: its class has no method inputs(path), which "
            "returns a data set of the inputs (see docs/extending.md). Add it, or choose data that has it.",
            key="data._target_",
        )
    try:
        dataset = read(path)
        count = len(dataset)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    if not count:
        raise DataError(
            f"input={path} contains nothing that data={type(data.source).__name__} can read. Check the path."
        )
    return dataset, getattr(data.source, "collate_inputs", None) or data.collate


def plain(value: Any) -> Any:
    """Convert a value to JSON types: tensors and arrays to lists of numbers, NaN and infinity to None.

    Raises:
        UserCodeError: the value has no JSON form.
    """
    if hasattr(value, "tolist"):  # a tensor, an array, a number of NumPy
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise UserCodeError(
        f"predict_step returned a {type(value).__name__}, which has no JSON form. Return numbers, text, lists, "
        "mappings or tensors.",
        "",
    )


# ---- exporting ------------------------------------------------------------------------------------------------------


def export(job: Job, runtime: Runtime, control: Control, weights: str, folder: Path) -> None:
    """Write `weights.safetensors` and the exported program `network.pt2` to `folder`.

    Raises:
        ConfigError: the package safetensors is missing.
        ExportError: the network cannot be exported; the weights have been written.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ConfigError(
            "Package safetensors, which writes weights, is not installed: pip install 'launch-train[examples]'."
        ) from error
    data, model = load_trained(job, runtime, weights)
    for tensor in (*model.parameters(), *model.buffers()):  # callers of the program pass contiguous tensors
        tensor.data = tensor.data.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, because the format does not allow tied weights, which share memory.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    with _atomic_file(folder / "weights.safetensors") as file:
        save_file(tensors, file, metadata={"format": "pt", "checkpoint": Path(weights).name})
    control.emit({"kind": "note", "text": f"{folder / 'weights.safetensors'}: {len(tensors)} tensors"})
    network = folder / "network.pt2"
    with suppress(FileNotFoundError):
        network.unlink()  # of an earlier export, in case this one fails
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            sizes = _export_network(model, _example(job, data, model, runtime), network)
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise ExportError(
            f"The network cannot be exported: {type(error).__name__}: {reason}. Its weights are in {folder}. "
            "torch.export must be able to trace `forward` with the arguments that export_inputs(batch) returns (see "
            "docs/extending.md)."
        ) from error
    control.emit({"kind": "note", "text": f"{network}: {sizes}; its outputs equal those of the network"})


def _example(job: Job, data: Data, model: nn.Module, runtime: Runtime) -> tuple[Any, ...]:
    """Return arguments of `forward` from a few samples."""
    dataset = next(iter(data.val.values()), data.train)
    loader = Loader(Fetch(dataset, data.collate, job.trainer.seed), runtime.device)
    batch = next(loader.once(0, torch.arange(min(_EXPORT_SAMPLES, len(dataset)))))
    choose = getattr(model, "export_inputs", None)
    if choose is not None:
        return tuple(choose(batch))
    if isinstance(batch, Mapping):
        return (next(iter(batch.values())),)
    return (batch[0],) if isinstance(batch, (list, tuple)) else (batch,)


def _export_network(model: nn.Module, arguments: tuple[Any, ...], file: Path) -> str:
    """Write the program, and compare the outputs of the loaded file with the network's. Return its batch sizes."""
    count = next((value.shape[0] for value in arguments if isinstance(value, Tensor) and value.ndim), 1)
    failure: Exception | None = None
    for dynamic in (True, False) if count > 1 else (False,):
        try:
            shapes = tuple(_dynamic(value, count) for value in arguments) if dynamic else None
            program = torch.export.export(model, arguments, dynamic_shapes=shapes)
        except Exception as error:
            failure = error
            continue
        with _atomic_file(file) as name:
            torch.export.save(program, name)
            loaded = torch.export.load(name).module()
            for size in (count, 1, count - 1) if dynamic else (count,):
                some = tuple(_first(value, count, size) for value in arguments)
                _compare(loaded(*some), model(*some))
        return "for batches of any size" if dynamic else f"for batches of {count} only"
    assert failure is not None
    raise failure


def _dynamic(value: Any, count: int) -> Any:
    batch = torch.export.Dim("batch", min=1)
    return {0: batch} if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else None


def _first(value: Any, count: int, size: int) -> Any:
    return value[:size] if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value


def _compare(found: Any, expected: Any) -> None:
    leaves, others = _pytree.tree_leaves(found), _pytree.tree_leaves(expected)
    if len(leaves) != len(others):
        raise ValueError(f"the program returns {len(leaves)} values and the network {len(others)}")
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


class _atomic_file:
    """Yields a temporary name to write to, and renames the file to `path` if no exception is raised."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"partial-{os.getpid()}-{path.name}")

    def __enter__(self) -> str:
        return str(self._partial)

    def __exit__(self, kind: Any, *rest: object) -> None:
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)
