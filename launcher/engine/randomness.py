"""Seeds and preserves the global random states of torch, Python and NumPy, which user code draws from."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

_MT19937_BYTES = 625 * 4  # the 624 words of NumPy's default generator, and its position


def seed_everything(seed: int) -> None:
    """Seed torch, random and NumPy. Before the model is built, every rank uses the same seed, for equal weights."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_for_reading(seed: int) -> None:
    """Seed the global generators before a sample or a batch is read.

    Only the current GPU is seeded, and only if CUDA is in use, because `torch.manual_seed` would store a seed for each
    GPU with every sample.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


class preserve_random_states:
    """Restores the random states of torch, random and NumPy at the end of the context.

    Args:
        device: if it is a GPU, its random state is restored as well.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._numpy = _NumPyState()

    def __enter__(self) -> None:
        self._states = torch.get_rng_state(), random.getstate()
        self._numpy.enter()
        self._of_gpu = None if self._gpu is None else torch.cuda.get_rng_state(self._gpu)

    def __exit__(self, *exception: object) -> None:
        if self._gpu is not None and self._of_gpu is not None:
            torch.cuda.set_rng_state(self._of_gpu, self._gpu)
        torch.set_rng_state(self._states[0])
        random.setstate(self._states[1])
        self._numpy.leave()


class _NumPyState:
    """Exchanges the bit generator of NumPy's global functions, and restores the original one.

    `np.random.get_state` and `set_state` take 50 to 150 us each, because they copy 624 words one by one. The exchange
    takes 1 us, but it drops the cached second number of a pair of normal numbers (`has_gauss`). `get_state` is
    therefore called only if the words have changed since it last found no cached number, that is, if other code has
    drawn.
    """

    _spare = np.random.MT19937(0)
    _without_gauss = b""  # the words of the global generator when it had no cached number

    def enter(self) -> None:
        self._former: Any = np.random.mtrand.get_bit_generator()
        self._state: dict[str, Any] | None = None
        words = b""
        if isinstance(self._former, np.random.MT19937):
            words = ctypes.string_at(self._former.ctypes.state_address, _MT19937_BYTES)
        if not words or words != _NumPyState._without_gauss:
            state: dict[str, Any] = np.random.get_state(legacy=False)
            if state["has_gauss"]:
                self._state = state
            else:
                _NumPyState._without_gauss = words
        # Contexts may be nested, so the spare generator may be in use already.
        other = _NumPyState._spare if self._former is not _NumPyState._spare else np.random.MT19937(0)
        np.random.mtrand.set_bit_generator(other)

    def leave(self) -> None:
        np.random.mtrand.set_bit_generator(self._former)
        if self._state is not None:
            np.random.set_state(self._state)
