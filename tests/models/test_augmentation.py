"""Augmentation of whole batches: independent of the batch, and correct."""

from __future__ import annotations

import itertools

import torch

from models.augmentation import CropAndFlip, draws


def test_the_augmentation_of_a_sample_does_not_depend_on_its_batch() -> None:
    x = torch.arange(6 * 2 * 5 * 4, dtype=torch.uint8).reshape(6, 2, 5, 4)
    seeds = torch.arange(6) * 7919
    whole, _ = CropAndFlip(2)((x, seeds), seeds)
    parts = torch.cat([CropAndFlip(2)((x[part], seeds[part]), seeds[part])[0] for part in ([0], [1, 2, 3], [4, 5])])

    assert torch.equal(whole, parts)
    assert (
        len(
            {
                picture.numpy().tobytes()
                for picture in CropAndFlip(2)((x[:1].expand(200, -1, -1, -1),), torch.arange(200))[0]
            }
        )
        > 30
    )


def test_pictures_are_only_shifted_and_flipped() -> None:
    x = torch.rand(64, 3, 6, 6)
    (moved,) = CropAndFlip(1)((x,), torch.arange(64))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    seen = set()
    for picture, source in zip(moved, padded, strict=True):
        fits = []
        for down, right, mirrored in itertools.product(range(3), range(3), (False, True)):
            window = source[:, down : down + 6, right : right + 6]
            if torch.equal(picture, window.flip(2) if mirrored else window):
                fits.append((down, right, mirrored))
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 12


def test_draws_are_uniform_and_differ_between_neighbouring_seeds() -> None:
    """The first number of SplitMix64 with seed 0 is 0xE220A8397B1DCDAF (reference implementation)."""
    numbers = draws(torch.arange(10_000), 2)

    assert int(draws(torch.zeros(1, dtype=torch.int64), 1)) == 0xE220A8397B1DCDAF >> 33
    assert abs(float(numbers.double().mean()) / 2**31 - 0.5) < 0.01
    assert len(numbers.unique()) > 19_990
    assert abs(float(torch.corrcoef(numbers.T.double())[0, 1])) < 0.03
