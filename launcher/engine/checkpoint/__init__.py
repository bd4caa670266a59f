"""Checkpoints that are written atomically, verified by checksum and read without executing code.

If the newest checkpoint is damaged, the next older intact one is used. `files` does not need torch, and importing this
package does not import it: the other names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from launcher.engine.checkpoint.files import (
    DamagedCheckpoint,
    NewestCheckpoint,
    available,
    name_of,
    newest_intact,
    step_of,
    verify,
)

if TYPE_CHECKING:
    from launcher.engine.checkpoint.loading import Content, inspect, load, load_weights
    from launcher.engine.checkpoint.nest import Mismatch, TensorInfo
    from launcher.engine.checkpoint.saver import Checkpointer, SavedCheckpoint
    from launcher.engine.checkpoint.training import (
        load_model_state,
        load_optimizer_state,
        model_state,
        optimizer_state,
        optimizer_template,
        restore_training,
        training_state,
        unwrap,
    )

_HOMES = {
    "loading": ("Content", "inspect", "load", "load_weights"),
    "nest": ("Mismatch", "TensorInfo"),
    "saver": ("Checkpointer", "SavedCheckpoint"),
    "training": (
        "load_model_state",
        "load_optimizer_state",
        "model_state",
        "optimizer_state",
        "optimizer_template",
        "restore_training",
        "training_state",
        "unwrap",
    ),
}

__all__ = [
    "Checkpointer",
    "Content",
    "DamagedCheckpoint",
    "Mismatch",
    "NewestCheckpoint",
    "SavedCheckpoint",
    "TensorInfo",
    "available",
    "inspect",
    "load",
    "load_model_state",
    "load_optimizer_state",
    "load_weights",
    "model_state",
    "name_of",
    "newest_intact",
    "optimizer_state",
    "optimizer_template",
    "restore_training",
    "step_of",
    "training_state",
    "unwrap",
    "verify",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
