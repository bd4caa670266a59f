"""Random numbers of data sets depend only on seed, epoch and position, in every process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from launcher.engine.data import Loader
from launcher.engine.fetch import Fetch
from launcher.engine.order import Key, Order, Split, keys_of_training
from launcher.engine.randomness import preserve_random_states, seed_everything
from launcher.engine.runtime import Runtime
from launcher.engine.stream import StreamLoader
from tests.support.engine_ranks import (
    Script,
    assert_same_log,
    assert_same_run,
    assert_same_weights,
    final_weights,
    logged,
    make_job,
    succeed,
)

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


class Items(Dataset[Any]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        return draw()


class Batches(Items):
    def __getitems__(self, indices: list[int]) -> Any:
        return [draw() for _ in indices]


class WholeBatches(Items):
    def __getitems__(self, indices: list[int]) -> Any:
        return torch.tensor([draw() for _ in indices])


class Plain(Items):
    def __getitem__(self, index: int) -> Any:
        return index


def drawing_collate(samples: Any) -> Any:
    return torch.tensor([draw() for _ in samples])


class Noisy(TensorDataset):
    """Has its own `__getitem__`."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(draw())


WAYS: dict[str, tuple[Any, Any]] = {
    "getitem": (Items(), None),
    "getitems": (Batches(), None),
    "whole batches": (WholeBatches(), None),
    "collate": (Plain(), drawing_collate),
    "collate of tensors": (TensorDataset(torch.arange(60)), drawing_collate),
    "a subclass of TensorDataset": (Noisy(torch.arange(60)), None),
}


def drawn(way: str, num_workers: int, rank: int = 0, ranks: int = 1, seed: int = 0, from_batch: int = 0) -> list[Any]:
    """Return the random numbers of two epochs, starting at a batch of the first one."""
    dataset, collate = WAYS[way]
    keys = keys_of_training(Order(60, 20, seed), Split(microbatch=5), rank, ranks, 0, from_batch, 6, from_batch)
    batches = Loader(Fetch(dataset, collate, seed), CPU, num_workers).read(keys)
    return [np.asarray(leaf).tolist() for batch in batches for leaf in (batch if isinstance(batch, list) else [batch])]


@pytest.mark.parametrize("way", WAYS)
def test_random_numbers_depend_on_seed_epoch_and_position(way: str) -> None:
    whole = drawn(way, 0)
    assert drawn(way, 2) == whole, "loader processes draw other numbers"
    assert drawn(way, 1) == whole
    per_batch = len(whole) // 24  # 4 microbatches per step, 6 steps
    assert drawn(way, 1, from_batch=2) == whole[8 * per_batch :], "a resume draws other numbers"
    assert drawn(way, 0, seed=1) != whole
    halves = [drawn(way, 1, rank, 2) for rank in (0, 1)]
    assert not any(one in halves[1] for one in halves[0]), "two ranks draw the same numbers"
    assert all(number in whole for half in halves for number in half)
    # No number occurs twice, within an epoch or across epochs.
    assert len({str(numbers) for numbers in whole}) == len(whole)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_random_states_as_they_were(way: str, num_workers: int) -> None:
    def seed() -> None:
        seed_everything(1)
        np.random.randn()  # the generator caches the second number of a pair

    seed()
    expected = [*draw(), np.random.randn(), np.random.randn()]
    for _ in range(2):
        seed()
        between = drawn(way, num_workers)
        assert [*draw(), np.random.randn(), np.random.randn()] == expected
        assert between


def test_blocks_with_their_own_random_numbers_may_be_nested() -> None:
    np.random.seed(7)
    expected = np.random.rand(3)
    np.random.seed(7)
    for number in range(3):
        with preserve_random_states():
            np.random.seed(1)
            with preserve_random_states():
                np.random.seed(2)
                np.random.randn()
            first = np.random.rand()
        assert np.random.rand() == expected[number]
        assert first == np.random.RandomState(1).rand()


def test_a_batch_does_not_draw_what_its_first_sample_drew() -> None:
    def collate(samples: Any) -> Any:
        return samples[0], draw()

    sample, batch = next(Loader(Fetch(Items(), collate, 0), CPU).read(iter([Key(0, 0, torch.arange(4))])))
    assert not set(sample) & set(batch)


def test_global_generators_in_augment_are_bound_too() -> None:
    """Would be wrong: transforms of torchvision, as `augment`, draw other numbers after a resume."""

    def augment(batch: Any, seeds: Tensor) -> Any:
        return torch.tensor(draw())

    def read(first: int) -> list[float]:
        keys = keys_of_training(Order(60, 20, 0), Split(), 0, 1, 0, first, 3, first)
        return [
            batch.tolist() for batch in Loader(Fetch(TensorDataset(torch.arange(60)), None, 0, augment), CPU).read(keys)
        ]

    seed_everything(5)
    expected = draw()
    seed_everything(5)
    whole = read(0)
    assert draw() == expected
    assert read(1) == whole[1:]
    assert whole[0] != whole[1]


class AskingForASeed(Items):
    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        return -1 if info is None else info.seed


def test_the_seeds_of_loader_processes_differ_between_ranks_and_runs() -> None:
    def seed(first: int, seed: int) -> int:
        keys = iter([Key(0, first, torch.arange(1))])
        return int(next(Loader(Fetch(AskingForASeed(), None, seed), CPU, 1).read(keys)))

    assert len({seed(0, 0), seed(10, 0), seed(0, 1)}) == 3
    assert seed(10, 0) == seed(10, 0)


class DrawingStream(TensorDataset):
    def stream(self, rank: int, world_size: int, seed: int, apply: Any = map) -> Iterator[Any]:
        for _ in range(4):
            yield torch.tensor([draw() for _ in range(3)])


def test_a_stream_draws_other_numbers_on_each_rank_and_leaves_those_of_the_trainer() -> None:
    dataset = DrawingStream(torch.arange(12))

    def read(rank: int, at: int, seed: int = 0) -> list[Any]:
        runtime = Runtime(rank, 2, rank, 2, CPU)
        loader = StreamLoader(dataset, runtime, seed, fetch=Fetch(dataset, None, seed), convert=lambda batch: batch)
        keys = iter([Key(0, 0, torch.arange(4))] * 6)
        found = []
        for batch in loader.read(keys, at):
            found.append(batch.tolist())
            own.append(draw())  # draws of the trainer
        return found

    own: list[Any] = []
    seed_everything(5)
    expected = [draw() for _ in range(6)]
    seed_everything(5)
    first = read(0, 0)
    assert own == expected
    assert read(0, 0) == first
    rows = [str(row) for found in (first, read(1, 0), read(0, 3), read(0, 0, 1)) for batch in found for row in batch]
    assert len(set(rows)) == len(rows)


# ---- a whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collate", [True, False])
def test_a_run_that_draws_while_it_reads_is_the_same_after_a_resume(collate: bool, tmp_path: Path) -> None:
    """Case 1: `collate` that returns random numbers, loader processes, two ranks."""

    def job(num_workers: int, **how: Any) -> Any:
        data = {"_target_": "Drawing", "collates": collate, "num_workers": num_workers}
        return make_job(data=data, epochs=2, evaluate_every=5, **how)

    succeed(job(1), tmp_path / "whole", 2)
    succeed(job(0), tmp_path / "here", 2)
    assert_same_log(tmp_path / "whole", tmp_path / "here")
    succeed(job(1), tmp_path / "parts", 2, scripts=Script(stop_after=4))
    succeed(job(2), tmp_path / "parts", 2)
    assert_same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))
    succeed(job(1, seed=3), tmp_path / "other", 2)
    assert logged(tmp_path / "whole")[1]["train/loss"] != logged(tmp_path / "other")[1]["train/loss"]


def test_a_batch_that_draws_is_the_same_for_any_number_of_workers_in_deterministic_mode(tmp_path: Path) -> None:
    for workers in (1, 2):
        data = {"_target_": "Drawing", "collates": True, "num_workers": workers - 1}
        succeed(make_job(data=data, deterministic=True, epochs=1, log_every=3), tmp_path / str(workers), workers)
    assert_same_run(tmp_path / "1", tmp_path / "2")
