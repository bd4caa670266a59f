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
    """Leave the random states of torch (CPU), random and NumPy as they were."""

    def __enter__(self) -> None:
        self._states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def __exit__(self, *exception: object) -> None:
        torch.set_rng_state(self._states[0])
        random.setstate(self._states[1])
        np.random.set_state(self._states[2])
