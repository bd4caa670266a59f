"""The names of configuration keys, and their names in other tools.

Plain Python: no Hydra, no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from launcher.config.schema import OPEN_SECTIONS, job_schema

_WORKERS = "scaling.workers is the number of worker processes over all machines, one per GPU by default"
_BATCH = "trainer.global_batch_size is the number of samples in one optimizer step over all workers"
_ACCUMULATE = "accumulation is derived from trainer.microbatch_size, the most samples a worker takes at once"
_RESUME = "run.resume=true with run.name=NAME continues a run; checkpoint.load=NAME takes only its weights"
_EPOCHS = "trainer.epochs is the number of passes over the training data"
_STEPS = "trainer.steps is the number of optimizer steps"
_RATE = "optimizer.lr is the learning rate of every optimizer"
_PRECISION = "trainer.precision is float32, bfloat16 or float16"
_CLIP = "trainer.clip_norm is the largest global norm of the gradient"
_LOADERS = "data.num_workers is the number of loader processes of a data set that takes one"
_LOG = "trainer.log_every is an interval in steps (50), epochs (1ep) or time (10min)"
_EVALUATE = "trainer.evaluate_every is an interval in steps (50), epochs (1ep) or time (10min)"
_SAVE = "checkpoint.every is an interval in steps (50), epochs (1ep) or time (10min)"

# Key of Lightning, Transformers, Accelerate, torchrun or DeepSpeed -> key of launch.
FOREIGN: dict[str, str] = {
    **dict.fromkeys(("max_epochs", "num_epochs", "num_train_epochs", "n_epochs"), _EPOCHS),
    **dict.fromkeys(("max_steps", "num_steps", "max_iters", "num_training_steps", "total_steps"), _STEPS),
    **dict.fromkeys(("batch_size", "train_batch_size", "per_device_train_batch_size", "bs"), _BATCH),
    **dict.fromkeys(("micro_batch_size", "train_micro_batch_size_per_gpu"), _ACCUMULATE),
    **dict.fromkeys(("accumulate_grad_batches", "gradient_accumulation_steps", "grad_accum"), _ACCUMULATE),
    **dict.fromkeys(("devices", "gpus", "n_gpus", "num_gpus", "num_nodes", "nnodes"), _WORKERS),
    **dict.fromkeys(("nproc_per_node", "num_processes", "world_size", "n_workers", "ngpus"), _WORKERS),
    **dict.fromkeys(("ckpt_path", "resume_from_checkpoint", "resume_from", "restore"), _RESUME),
    **dict.fromkeys(("learning_rate", "lr"), _RATE),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision", "use_amp", "dtype"), _PRECISION),
    **dict.fromkeys(("gradient_clip_val", "max_grad_norm", "grad_clip", "clip_grad_norm"), _CLIP),
    **dict.fromkeys(("num_loader_workers", "dataloader_num_workers"), _LOADERS),
    **dict.fromkeys(("log_every_n_steps", "logging_steps"), _LOG),
    **dict.fromkeys(("check_val_every_n_epoch", "val_check_interval", "eval_steps", "eval_every"), _EVALUATE),
    **dict.fromkeys(("save_steps", "every_n_train_steps", "checkpoint_every", "save_every"), _SAVE),
    "num_workers": f"{_WORKERS}; {_LOADERS}",
    "accelerator": "scaling.device is auto, cpu or cuda",
    "device": "scaling.device is auto, cpu or cuda",
    "seed": "trainer.seed is the one seed of a run",
    "seed_everything": "trainer.seed is the one seed of a run",
    "save_top_k": "checkpoint.keep is the number of checkpoints kept beside the best",
    "default_root_dir": "run.root is the directory under which runs are written",
    "output_dir": "run.root is the directory under which runs are written, run.name the run's own below it",
    "name": "run.name is the run's name",
    "sync_bn": "trainer.sync_batchnorm=true synchronises batch normalisation over the workers",
    "torch_compile": "trainer.compile=true compiles the network",
}


@cache
def leaves() -> dict[str, Any]:
    """Return dotted key -> type, for every key of the schema with a type of its own."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(job_schema()).items():
        if dataclasses.is_dataclass(kind):
            keys.update({f"{name}.{inner}": hint for inner, hint in typing.get_type_hints(kind).items()})
        else:
            keys[name] = kind
    return keys


@cache
def sections() -> tuple[str, ...]:
    """Return the sections of the schema whose keys have types of their own."""
    return tuple(dict.fromkeys(key.partition(".")[0] for key in leaves() if "." in key))


# Keys in the config.yaml of runs of earlier versions that did not affect their result.
REMOVED = frozenset(["scaling.heal"])


def is_known(key: str) -> bool:
    """Return whether a dotted key is in the schema, or inside a section that is open."""
    return key in leaves() or key in sections() or key.partition(".")[0] in OPEN_SECTIONS


def explain_unknown(key: str, others: Iterable[str] = ()) -> str:
    """Return a suggestion for an unknown key: one or two sentences, or an empty text.

    others: further valid names, such as configuration groups.
    """
    last = key.rpartition(".")[2]
    if last in FOREIGN:
        return f" Here, {FOREIGN[last]}."
    same = [known for known in leaves() if known.rpartition(".")[2] == last]
    if same:
        return f' Did you mean "{same[0]}"?'
    known = [*leaves(), *others]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        by_last = {name.rpartition(".")[2]: name for name in known}
        near = [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    if near:
        return f' Did you mean "{near[0]}"?'
    section = key.partition(".")[0]
    inside = [name for name in leaves() if name.startswith(f"{section}.")]
    if inside:
        return f" {section} has: {', '.join(name.partition('.')[2] for name in inside)}."
    return " Put values of your own, for interpolation, under vars."


def type_name(key: str) -> str:
    """Return the type of a key of the schema in words."""
    hint = leaves().get(key)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    if typing.get_origin(hint) in (list, dict):
        return "a list" if typing.get_origin(hint) is list else "a mapping"
    text = words.get(kinds[0], "any value")
    return f"{text}, or null" if type(None) in typing.get_args(hint) else text
