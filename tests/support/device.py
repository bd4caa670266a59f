"""The device on which tests marked `gpu` compute: pytest's --device, which every process of a test inherits."""

from __future__ import annotations

import os

_VARIABLE = "LAUNCH_TEST_DEVICE"


def choose(device: str) -> None:
    os.environ[_VARIABLE] = device


def device() -> str:
    """Return `cpu` or `cuda`; the ranks of a test share one GPU."""
    return os.environ.get(_VARIABLE, "cpu")
