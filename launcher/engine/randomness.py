"""The random states of a process: torch's, Python's and NumPy's, which user code draws from."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

_MT19937_BYTES = 625 * 4  # the 624 words of NumPy's default generator, and its place in them


def seed_everything(seed: int) -> None:
    """Seed torch, random and NumPy. For the weights alike on every rank: they must begin the same."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_for_reading(seed: int) -> None:
    """Seed the global generators before a sample or a batch is read.

    Of the GPUs, only the current one is seeded, and only where CUDA is in use: `torch.manual_seed` would note a seed
    for each of them with every sample.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


class preserve_random_states:
    """Leave the random states of torch, random and NumPy as they were.

    Args:
        device: where it is a GPU, its state too.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._numpy = _OwnNumPy()

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


class _OwnNumPy:
    """Puts another bit generator under NumPy's global functions, and the former one back.

    `np.random.get_state` and `set_state` take 50 to 150 us each: they copy 624 words one by one. The exchange takes
    1 us, but it drops the second normal number of a pair that the generator keeps (`has_gauss`). So `get_state` is
    called where the words have changed since it last found no such number, that is: where something else has drawn.
    """

    _spare = np.random.MT19937(0)
    _without_gauss = b""  # the words of the global generator when it kept no number

    def enter(self) -> None:
        self._former: Any = np.random.mtrand.get_bit_generator()
        self._state: dict[str, Any] | None = None
        words = b""
        if isinstance(self._former, np.random.MT19937):
            words = ctypes.string_at(self._former.ctypes.state_address, _MT19937_BYTES)
        if not words or words != _OwnNumPy._without_gauss:
            state: dict[str, Any] = np.random.get_state(legacy=False)
            if state["has_gauss"]:
                self._state = state
            else:
                _OwnNumPy._without_gauss = words
        # One of its own for each block, since blocks may be nested.
        other = _OwnNumPy._spare if self._former is not _OwnNumPy._spare else np.random.MT19937(0)
        np.random.mtrand.set_bit_generator(other)

    def leave(self) -> None:
        np.random.mtrand.set_bit_generator(self._former)
        if self._state is not None:
            np.random.set_state(self._state)
