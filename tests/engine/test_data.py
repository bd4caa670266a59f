"""Reading samples: independent of the number of loader processes, and errors of bad samples."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from launcher.engine.data import Loader, in_background
from launcher.engine.fetch import Fetch
from launcher.engine.order import Key, Order, Split, keys_of_training, mix
from launcher.errors import DataError, UserCodeError
from tests.support import engine_toys as toys
from tests.support.engine_ranks import (
    Script,
    assert_same_log,
    assert_same_run,
    assert_same_weights,
    final_weights,
    launch,
    make_job,
    succeed,
)

CPU = torch.device("cpu")


# ---- reading --------------------------------------------------------------------------------------------------------


class Listed(Dataset[Any]):
    """A data set whose `__getitems__` returns samples."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read sample by sample, although `__getitems__` exists")

    def __getitems__(self, indices: list[int]) -> Any:
        assert isinstance(indices, list)
        return [(torch.tensor([float(i)]), i) for i in indices]


class Whole(Listed):
    """A data set whose `__getitems__` returns a batch."""

    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": torch.tensor(indices), "names": [f"sample {i}" for i in indices]}


class Seeded(Listed):
    """A data set whose `__getitems__` accepts seeds."""

    def __getitems__(self, indices: list[int], seeds: Sequence[int] = ()) -> Any:
        return torch.tensor(seeds)


def read(dataset: Any, indices: list[int], collate: Any = None, epoch: int = 0, seed: int = 0, first: int = 0) -> Any:
    return Fetch(dataset, collate, seed)[Key(epoch, first, torch.tensor(indices))]


def keys(*parts: list[int], epoch: int = 0) -> Iterator[Key]:
    """Yield the keys of consecutive microbatches with these samples."""
    first = 0
    for part in parts:
        yield Key(epoch, first, torch.tensor(part))
        first += len(part)


def test_every_kind_of_data_set_is_collated() -> None:
    tensors = TensorDataset(torch.arange(20).reshape(10, 2), torch.arange(10))
    x, y = read(tensors, [3, 1])
    assert (x.tolist(), y.tolist()) == ([[6, 7], [2, 3]], [3, 1])
    samples = read(tensors, [3, 1], collate=list)
    assert [(x.tolist(), y.item()) for x, y in samples] == [([6, 7], 3), ([2, 3], 1)]
    x, y = read(Listed(), [3, 1])
    assert (x.tolist(), y.tolist()) == ([[3.0], [1.0]], [3, 1])
    assert read(Listed(), [3, 1], collate=lambda samples: [i for _, i in samples]) == [3, 1]
    assert read(Whole(), [3, 1])["names"] == ["sample 3", "sample 1"]
    assert read(Whole(), [3, 1], collate=lambda batch: batch["x"].sum()) == 4
    x, _, number = read(toys.Samples(10, noise=False), [3, 1])
    assert (tuple(x.shape), number.tolist()) == ((2, toys.FEATURES), [3, 1])
    x, _, number = read(Subset(toys.Samples(10, noise=False), [5, 6, 7]), [2, 0])
    assert number.tolist() == [7, 5]
    assert read(Subset(Listed(), [5, 6, 7]), [2, 0])[1].tolist() == [7, 5]


def test_augmentation_depends_only_on_seed_epoch_and_position() -> None:
    for dataset in (toys.Samples(50), Subset(toys.Samples(50), range(50))):  # a Subset only loops over the samples
        single = read(dataset, [7], first=12)[0][0]
        assert torch.equal(read(dataset, [3, 9, 7], first=10)[0][2], single)
        assert not torch.equal(read(dataset, [7], first=13)[0][0], single), (
            "a repeated sample has the same augmentation"
        )
        assert not torch.equal(read(dataset, [7], epoch=1, first=12)[0][0], single)
        assert not torch.equal(read(dataset, [7], seed=1, first=12)[0][0], single)
    seeds = read(Seeded(), [3, 7], first=4).tolist()
    assert seeds == [mix(0, 0, 4), mix(0, 0, 5)]
    assert read(Seeded(), [7], epoch=2, seed=5).tolist() == [mix(5, 2, 0)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", [toys.Samples(50), Subset(toys.Samples(50), range(50)), Listed()])
def test_reading_does_not_advance_the_trainers_random_state(dataset: Any, num_workers: int) -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    def seed() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    seed()
    expected = draw()
    seed()
    loader = Loader(Fetch(dataset, None, 0), CPU, num_workers)
    assert len(list(loader.read(keys([1, 2], [3])))) == 2
    assert draw() == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_processes_read_the_same_batches_as_this_process(num_workers: int) -> None:
    order = Order(50, 9, 0)

    def batches(workers: int) -> list[Any]:
        read = keys_of_training(order, Split(microbatch=4), 0, 1, 0, 0, 12, 0)
        return list(Loader(Fetch(toys.Samples(50), None, 0), CPU, workers).read(read))

    expected, found = batches(0), batches(num_workers)
    assert len(expected) == len(found) == 34
    assert all(
        torch.equal(a, b) for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True)
    )


class ReadingProcess(Listed):
    """A data set whose batches have the id of the reading process."""

    def __getitems__(self, indices: list[int]) -> Any:
        return torch.tensor([os.getpid()])


def test_in_memory_tensors_are_gathered_in_this_process_regardless_of_num_workers() -> None:
    (pid,) = Loader(Fetch(ReadingProcess(), None, 0), CPU, 1).read(keys([1]))
    assert pid.item() != os.getpid()
    tensors = Loader(Fetch(TensorDataset(torch.arange(3)), None, 0), CPU, 2).read(keys([1]))
    next(tensors)
    assert not loader_processes()


def loader_processes() -> list[int]:
    """Return the processes that were forked from this one, like PyTorch's loader processes."""
    own = Path("/proc/self/cmdline").read_bytes()
    return [pid for pid in toys.living_children() if Path(f"/proc/{pid}/cmdline").read_bytes() == own]


def test_closing_early_waits_for_the_current_item() -> None:
    read: list[int] = []

    def slowly() -> Iterator[int]:
        for number in range(9):
            time.sleep(0.05)
            read.append(number)
            yield number

    items = in_background(slowly())
    assert next(items) == 0
    items.close()
    before = list(read)
    time.sleep(0.2)
    assert read == before  # reading has ended
    assert list(in_background(iter(range(4)))) == [0, 1, 2, 3]


# ---- bad samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("raises", "kind", "words"),
    [
        ("value", DataError, "digits.csv, row 7: expected 785 numbers, found 3."),
        ("os", DataError, "picture-7.png"),
        ("bug", UserCodeError, "KeyError: 'label'"),
    ],
)
def test_a_bad_sample_is_reported_with_the_message_of_the_data_set(
    raises: str, kind: type[Exception], words: str, num_workers: int
) -> None:
    loader = Loader(Fetch(toys.Samples(10, bad=7, raises=raises), None, 0), CPU, num_workers)
    batches = loader.read(keys(*([i] for i in range(5, 10))))
    assert [int(next(batches)[2]) for _ in range(2)] == [5, 6]
    with pytest.raises(kind) as caught:
        next(batches)
    assert words in str(caught.value)
    if isinstance(caught.value, UserCodeError):
        text = caught.value.traceback_text
        assert text.count("File ") == 1
        assert "engine_toys.py" in text
    assert not loader_processes()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_ends_the_run_on_all_ranks(num_workers: int, tmp_path: Path) -> None:
    job = make_job(data={"_target_": "Augmented", "bad": 900, "num_workers": num_workers}, checkpoint={"every": 1})
    ranks = launch(job, tmp_path, 2, timeout=240)
    kinds = sorted(str(rank.error and rank.error[0]) for rank in ranks)
    assert kinds == ["DataError", "WorkerLost"]
    (error,) = [rank.error for rank in ranks if rank.error and rank.error[0] == "DataError"]
    assert "digits.csv, row 900" in error[1]
    assert [rank.children for rank in ranks] == [[], []]


def test_loader_processes_ignore_ctrl_c() -> None:
    seen: list[int] = []
    original = {
        number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        loader = Loader(Fetch(toys.Samples(10), None, 0), CPU, 1)
        batches = loader.read(keys(*([i] for i in range(10))))
        next(batches)
        (pid,) = loader_processes()
        for _ in range(3):
            os.kill(pid, signal.SIGINT)
        assert int(next(batches)[2]) == 1
        # Python ends remaining processes with SIGTERM, and waits for them.
        masks = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert not any(int(masks[mask], 16) >> (signal.SIGTERM - 1) & 1 for mask in ("SigIgn", "SigCgt"))
        assert len(list(batches)) == 8
    finally:
        for number, handler in original.items():
            signal.signal(number, handler)
    assert not seen


# ---- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_does_not_depend_on_the_number_of_loader_processes(tmp_path: Path) -> None:
    for name, workers, num_workers in (("none", 1, 0), ("two", 1, 2), ("one each", 3, 1)):
        job = make_job(
            data={"_target_": "Augmented", "num_workers": num_workers}, deterministic=True, epochs=2, log_every=3
        )
        ranks = succeed(job, tmp_path / name, workers)
        assert [rank.children for rank in ranks] == [[]] * workers
        assert_same_run(tmp_path / "none", tmp_path / name)


def test_random_layers_do_not_depend_on_the_reading_process(tmp_path: Path) -> None:
    for num_workers in (0, 1):
        job = make_job(
            model={"_target_": "Net", "dropout": 0.5},
            data={"_target_": "Augmented", "num_workers": num_workers},
            epochs=1,
            evaluate_every=3,
        )
        succeed(job, tmp_path / str(num_workers), 2)
    assert_same_log(tmp_path / "0", tmp_path / "1")
    assert_same_weights(final_weights(tmp_path / "0"), final_weights(tmp_path / "1"))


def test_loader_processes_end_with_a_stopped_run(tmp_path: Path) -> None:
    job = make_job(data={"_target_": "Augmented", "num_workers": 2}, epochs=2)
    ranks = succeed(job, tmp_path, 2, scripts={0: Script(stop_after=3)})
    assert [rank.children for rank in ranks] == [[], []]


def test_augmentation_on_the_device_depends_only_on_seed_epoch_and_position() -> None:
    """Guards against augmentation that depends on the number of workers or of loader processes."""
    fetch = Fetch(TensorDataset(torch.arange(40)), None, 3, lambda batch, seeds: (batch[0] * 0, seeds))
    reader = Fetch(toys.Samples(40), None, 3, lambda batch, seeds: (batch[0] * 0, seeds))

    def seeds(fetch: Fetch, workers: int, epoch: int, *parts: list[int]) -> list[int]:
        batches = Loader(fetch, CPU, workers).read(keys(*parts, epoch=epoch))
        return [int(seed) for batch in batches for seed in batch[1]]

    whole = seeds(fetch, 0, 0, [5, 6, 7, 8])
    assert whole == seeds(reader, 0, 0, [1], [2, 3, 4]) == seeds(reader, 2, 0, [8, 8], [8, 8])
    assert len(set(whole)) == 4
    assert not set(whole) & set(seeds(fetch, 0, 1, [5, 6, 7, 8]))
