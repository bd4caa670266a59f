"""The random states of a process: torch's, Python's and NumPy's, which user code draws from."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch, random and NumPy. For the weights alike on every rank: they must begin the same."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


class own_randomness:
    """Leave the random states of torch, random and NumPy as they were.

    Args:
        device: where it is a GPU, its state too.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None

    def __enter__(self) -> None:
        self._states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._of_gpu = None if self._gpu is None else torch.cuda.get_rng_state(self._gpu)

    def __exit__(self, *exception: object) -> None:
        if self._gpu is not None and self._of_gpu is not None:
            torch.cuda.set_rng_state(self._of_gpu, self._gpu)
        torch.set_rng_state(self._states[0])
        random.setstate(self._states[1])
        np.random.set_state(self._states[2])
