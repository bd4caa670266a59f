"""Random augmentation of whole batches on their device; the random numbers of a sample derive from its own seed.

A data section provides one as `augment`: the launcher calls `augment(batch, seeds)` with training batches after they
were
copied to the device. The result for a sample depends on its seed alone, not on its batch, and is the same on CPU and
GPU: the numbers are computed from the seeds with integer arithmetic, not drawn from a generator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draws(seeds: Tensor, count: int) -> Tensor:
    """Return integers for each sample, uniformly distributed over 0 .. 2**31 - 1: seeds (B,) int64 -> (B, count) int64.

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), the k-th number of the
    stream of the seed.
    """
    steps = torch.arange(1, count + 1, device=seeds.device, dtype=torch.int64)
    state = seeds[:, None] + steps * -0x61C8864680B583EB  # multiplication of int64 wraps, as the method requires
    state = (state ^ _shifted(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shifted(state, 27)) * -0x6B2FB644ECCEEE15
    return _shifted(state ^ _shifted(state, 31), 33)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; `>>` of int64 fills with the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


class CropAndFlip:
    """Shift pictures by up to `padding` pixels in each direction, filled with zeros, and mirror every second one.

    (x (B, C, H, W), …), seeds (B,) -> the same with other pictures; x may be bytes or floats.
    """

    def __init__(self, padding: int = 0, flip: bool = True) -> None:
        self.padding, self.flip = padding, flip

    def __call__(self, batch: tuple[Tensor, ...], seeds: Tensor) -> tuple[Tensor, ...]:
        x, *others = batch
        samples, _, height, width = x.shape
        down, right, mirror = (draws(seeds, 3) % torch.tensor([2 * self.padding + 1] * 2 + [2]).to(x.device)).unbind(1)
        rows = torch.arange(height, device=x.device) + down[:, None]
        columns = torch.arange(width, device=x.device).repeat(samples, 1)
        if self.flip:
            columns = torch.where(mirror[:, None] > 0, width - 1 - columns, columns)
        columns = columns + right[:, None]
        padded = torch.nn.functional.pad(x, (self.padding,) * 4)
        which = torch.arange(samples, device=x.device)
        # Gathered in one indexing operation: (B, H, W, C), and back to (B, C, H, W), which is channels-last memory.
        moved = padded.permute(0, 2, 3, 1)[which[:, None, None], rows[:, :, None], columns[:, None, :]]
        return (moved.permute(0, 3, 1, 2), *others)
