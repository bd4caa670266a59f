"""Which samples, in which order, read by whom: the same for any number of workers and loader processes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from launcher.engine.batches import channels_last, tree_map
from launcher.engine.data import Fetch, Loader, in_background
from launcher.engine.datasets import Data
from launcher.engine.order import (
    BLOCKS,
    Order,
    Split,
    keys_of_evaluation,
    keys_of_training,
    mix,
    mix_each,
    order_of_evaluation,
)
from launcher.errors import DataError, UserCodeError
from tests.engine import engine_toys as toys
from tests.engine.engine_ranks import (
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


# ---- order and shares -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("size", [1, 3, 37, 100])
@pytest.mark.parametrize("split", [Split(), Split(microbatch=5), Split(chunk=13), Split(chunk=1)])
def test_shares_cover_a_batch_once_and_evenly(split: Split, size: int, workers: int) -> None:
    shares = [split.share(size, rank, workers) for rank in range(workers)]
    positions = [p for spans in shares for start, stop in spans for p in range(start, stop)]
    assert positions == list(range(size))
    unit = split.chunk or 1
    counts = [-(-sum(stop - start for start, stop in spans) // unit) for spans in shares]
    assert max(counts) - min(counts) <= 1
    assert counts[0] == max(counts)  # the first rank goes without a sample only when all do
    spans = [span for share in shares for span in share]
    assert all(stop - start <= (split.chunk or split.microbatch or size) for start, stop in spans)
    if split.chunk:  # cut by position, whoever takes it
        assert sorted(spans) == split.share(size, 0, 1)


@pytest.mark.parametrize("start", [(0, 0, 0), (0, 4, 4), (1, 2, 13), (1, 10, 21)])
def test_a_position_in_the_run_tells_what_comes_next(start: tuple[int, int, int]) -> None:
    order, split = Order(1037, 100, seed=4), Split(microbatch=9)
    epoch, batch, step = start

    def samples(workers: int, epoch: int, batch: int, step: int) -> list[tuple[int, int]]:
        """Of all ranks, a step after the other."""
        readers = [keys_of_training(order, split, r, workers, epoch, batch, 30, step) for r in range(workers)]
        found = []
        for now in range(step, 30):
            size = order.batch_size((batch + now - step) % 11)
            for rank, reader in enumerate(readers):
                for _ in split.share(size, rank, workers):
                    number, indices = next(reader)
                    found += [(number, int(index)) for index in indices]
        assert all(next(reader, None) is None for reader in readers)
        return found

    whole = samples(1, 0, 0, 0)
    rest = whole[epoch * 1037 + batch * 100 :]
    for workers in (1, 2, 3, 5):
        assert samples(workers, epoch, batch, step) == rest


def test_every_epoch_is_another_permutation_that_the_seed_decides() -> None:
    orders = [Order(50, 10, seed).epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert Order(50, 7, 0).epoch(1).tolist() == orders[1]  # not the size of a batch
    assert Order(50, 10, 2**63 - 1).epoch(2**40).unique().numel() == 50


def test_mixed_numbers_differ_and_fit_into_a_seed() -> None:
    seeds = {mix(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(500)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)
    last = torch.tensor([0, 1, 2**40, 2**62])
    assert mix_each(-3, 7, last=last).tolist() == [mix(-3, 7, number) for number in last.tolist()]


def test_evaluation_takes_every_sample_in_order() -> None:
    keys = list(keys_of_evaluation(torch.arange(7), [(2, 5), (5, 7)]))
    assert [(epoch, indices.tolist()) for epoch, indices in keys] == [(0, [2, 3, 4]), (0, [5, 6])]


# ---- lengths --------------------------------------------------------------------------------------------------------


def some_lengths(count: int, spread: int) -> torch.Tensor:
    return torch.randint(1, 1 + spread, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    ("count", "batch", "spread"),
    [(1037, 10, 100), (1037, 100, 100), (1000, 100, 7), (100, 100, 50), (57, 9, 1), (30, 1, 30), (9000, 16, 500)],
)
def test_samples_of_similar_length_share_a_batch(count: int, batch: int, spread: int, epoch: int) -> None:
    lengths = some_lengths(count, spread)
    order = Order(count, batch, 5, lengths=lengths)
    indices = order.epoch(epoch)
    assert torch.equal(indices.sort().values, torch.arange(count))  # each once
    assert torch.equal(indices, Order(count, batch, 5, lengths=lengths).epoch(epoch))
    assert count < 3 * batch or not torch.equal(indices, order.epoch(epoch + 1))
    batches = lengths[indices].split(batch)

    def padded(parts: Sequence[torch.Tensor]) -> int:
        return sum(int(part.max()) * len(part) for part in parts)

    shuffled = padded(lengths[Order(count, batch, 5).epoch(epoch)].split(batch))
    if count >= 100 * batch > 100:  # then a window has room to sort in
        waste, before = padded(batches) - int(lengths.sum()), shuffled - int(lengths.sum())
        assert waste < before / 4
    longest = [int(part.max()) for part in batches[:-1]]
    assert len(set(longest)) < 3 or longest != sorted(longest)  # the batches do not come by length


def test_the_smaller_last_batch_is_a_random_part_of_the_data() -> None:
    lengths = torch.arange(1004)
    last = torch.cat([Order(1004, 100, 0, lengths=lengths).epoch(epoch)[-4:] for epoch in range(50)])
    assert 400 < float(last.float().mean()) < 600


@pytest.mark.parametrize("sizes", [[10] * 20, [1, 200, 3], [7], [5, 0, 5]])
def test_neighbours_in_a_random_order_of_blocks_are_shuffled_together(sizes: list[int]) -> None:
    total = sum(sizes)
    order = Order(total, 4, 1, blocks=torch.tensor(sizes))
    indices = order.epoch(2)
    assert torch.equal(indices.sort().values, torch.arange(total))
    assert torch.equal(indices, Order(total, 9, 1, blocks=torch.tensor(sizes)).epoch(2))
    assert total < 9 or not torch.equal(indices, order.epoch(3))
    if len(sizes) == 20:
        blocks = (indices // 10).split(10 * BLOCKS)
        assert all(len(part.unique()) <= BLOCKS for part in blocks)
        assert indices.tolist() != sorted(indices.tolist())


@pytest.mark.parametrize("blocks", [[1, 1], [4, -1], [1.5, 1.5]])
def test_blocks_that_are_none_are_refused(blocks: Any) -> None:
    class Three(list[int]):
        pass

    dataset = Three([1, 2, 3])
    dataset.blocks = blocks  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"not the sizes of its parts"):
        Data.of(Given(train=dataset))


def trained(rank: Any) -> list[Any]:
    """Return what a rank noted from its first step on; trials before it see samples too."""
    first = next(at for at, entry in enumerate(rank.record) if entry[0] == "step")
    return list(rank.record[first:])


# ---- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_stream_is_trained_with_in_whole_batches(workers: int, tmp_path: Path) -> None:
    data = {"_target_": "Flowing", "train": 600}
    job = make_job(model={"_target_": "Net", "note": True}, data=data, epochs=2, microbatch_size=30)
    ranks = succeed(job, tmp_path, workers)
    seen = [[number for entry in trained(rank) if entry[0] == "losses" for number in entry[1]] for rank in ranks]
    assert sum(map(len, seen)) == 1200
    # Every rank has its own part. Where ranks have equal shares of a batch, each sample comes once in a pass; where
    # they have not, a few are repeated and left out.
    found = sorted(number for numbers in seen for number in numbers)
    assert len(set(found)) > 590
    assert workers == 3 or found == sorted(list(range(600)) * 2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["samples"], result["epochs"]) == (12, 1200, 2.0)


def test_a_stream_that_is_resumed_goes_on_with_another_pass(tmp_path: Path) -> None:
    job = make_job(data={"_target_": "Flowing"}, epochs=1)
    succeed(job, tmp_path, 2, scripts=Script(stop_after=5))
    succeed(job, tmp_path, 3)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("raises", "kind", "words"),
    [
        ("value", "DataError", "shard-3.parquet, row 7"),
        ("bug", "UserCodeError", "KeyError"),
        ("empty", "DataError", "nothing"),
    ],
)
def test_a_stream_that_fails_is_told(raises: str, kind: str, words: str, tmp_path: Path) -> None:
    (rank,) = launch(make_job(data={"_target_": "Flowing", "raises": raises}), tmp_path)
    assert rank.error is not None
    assert rank.error[0] == kind
    assert words in rank.error[1]


def test_a_stream_is_refused_where_runs_must_agree_to_the_bit(tmp_path: Path) -> None:
    (rank,) = launch(make_job(data="Flowing", deterministic=True), tmp_path)
    assert rank.error is not None
    assert rank.error[0] == "ConfigError"
    assert "data.stream=false" in rank.error[1]


def test_overfitting_takes_the_first_samples_whatever_their_lengths() -> None:
    order = Order(100, 10, 0, only_batches=2, lengths=some_lengths(100, 9))
    assert order.epoch(1).tolist() == list(range(20))


@pytest.mark.parametrize(("count", "block"), [(203, 10), (200, 10), (9, 10), (10, 10), (1, 1)])
def test_evaluation_by_length_takes_every_sample_once_in_blocks(count: int, block: int) -> None:
    lengths = some_lengths(count, 50)
    order = order_of_evaluation(count, lengths, block)
    assert torch.equal(order.sort().values, torch.arange(count))
    parts = lengths[order].split(block)
    spans = sorted((int(part.min()), int(part.max())) for part in parts)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert torch.equal(order_of_evaluation(count), torch.arange(count))


@pytest.mark.parametrize("lengths", [[1, 2], [1.5, 2.0, 3.0], [[1], [2], [3]], ["a", "b", "c"], [[1], [2, 3], [4]], 7])
def test_lengths_that_are_none_are_refused(lengths: Any) -> None:
    class Three(list[int]):
        pass

    dataset = Three([1, 2, 3])
    dataset.lengths = lengths  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"one whole number for each of its 3 samples"):
        Data.of(Given(train=dataset))


def seen(ranks: Sequence[Any]) -> tuple[list[int], int]:
    """Return the samples that were trained with, and how much padding there was."""
    noted = [entry for rank in ranks for entry in trained(rank) if entry[0] == "batch"]
    return sorted(number for entry in noted for number in entry[1]), sum(entry[2] for entry in noted)


@pytest.mark.parametrize(("workers", "loaders"), [(1, 0), (2, 2), (3, 0)])
def test_every_sample_of_variable_length_is_trained_with_once(workers: int, loaders: int, tmp_path: Path) -> None:
    padding = {}
    for sort in (True, False):
        data = {"_target_": "Ragged", "sort": sort, "num_workers": loaders}
        ranks = succeed(
            make_job(model="Padded", data=data, epochs=1, global_batch_size=50), tmp_path / f"{sort}", workers
        )
        numbers, padding[sort] = seen(ranks)
        assert numbers == list(range(1037))
    assert padding[True] < padding[False] / 2


def test_a_run_over_variable_lengths_is_exact(tmp_path: Path) -> None:
    job = make_job(
        model="Padded", data="Ragged", epochs=2, deterministic=True, evaluate_every=4, checkpoint={"every": 3}
    )
    succeed(job, tmp_path / "whole", 1)
    succeed(job, tmp_path / "resumed", 2, scripts=Script(stop_after=7))
    succeed(job, tmp_path / "resumed", 3)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_validation_does_not_depend_on_the_order_by_length(tmp_path: Path) -> None:
    weights, found = None, []
    for sort, workers in ((True, 2), (True, 3), (False, 1)):
        data = {"_target_": "Ragged", "sort": sort}
        directory = tmp_path / f"{sort}{workers}"
        if weights is None:
            succeed(make_job(model="Padded", data=data, steps=3), directory, workers)
            weights = str(directory / "checkpoints" / "step-00000003")
        ranks = succeed(make_job(model="Padded", data=data), directory, workers, action="evaluate", weights=weights)
        found.append(ranks[0].result["val/loss"])
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


# ---- reading --------------------------------------------------------------------------------------------------------


class Listed(Dataset[Any]):
    """`__getitems__` that gives samples."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("read one by one although whole batches can be had")

    def __getitems__(self, indices: list[int]) -> Any:
        assert isinstance(indices, list)
        return [(torch.tensor([float(i)]), i) for i in indices]


class Whole(Listed):
    """`__getitems__` that gives a batch."""

    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": torch.tensor(indices), "names": [f"sample {i}" for i in indices]}


class Seeded(Listed):
    """`__getitems__` that augments."""

    def __getitems__(self, indices: list[int], seeds: Sequence[int] = ()) -> Any:
        return torch.tensor(seeds)


def read(dataset: Any, indices: list[int], collate: Any = None, epoch: int = 0, seed: int = 0) -> Any:
    return Fetch(dataset, collate, seed)[epoch, torch.tensor(indices)]


def test_every_kind_of_data_set_gives_its_batch() -> None:
    tensors = TensorDataset(torch.arange(20).reshape(10, 2), torch.arange(10))
    x, y = read(tensors, [3, 1])
    assert (x.tolist(), y.tolist()) == ([[6, 7], [2, 3]], [3, 1])
    assert read(tensors, [3, 1], collate=lambda batch: [part.sum().item() for part in batch]) == [18, 4]
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


def test_augmentation_depends_on_seed_epoch_and_sample_alone() -> None:
    for dataset in (toys.Samples(50), Subset(toys.Samples(50), range(50))):  # a Subset only loops over the samples
        alone = read(dataset, [7])[0][0]
        assert torch.equal(read(dataset, [3, 9, 7])[0][2], alone)
        assert not torch.equal(read(dataset, [7], epoch=1)[0][0], alone)
        assert not torch.equal(read(dataset, [7], seed=1)[0][0], alone)
    seeds = read(Seeded(), [3, 7]).tolist()
    assert seeds == [mix(0, 0, 3), mix(0, 0, 7)]
    assert read(Seeded(), [7], epoch=2, seed=5).tolist() == [mix(5, 2, 7)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", [toys.Samples(50), Subset(toys.Samples(50), range(50)), Listed()])
def test_reading_draws_none_of_the_trainers_random_numbers(dataset: Any, num_workers: int) -> None:
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
    assert len(list(loader.read(iter([(0, torch.tensor([1, 2])), (0, torch.tensor([3]))])))) == 2
    assert draw() == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_processes_give_what_this_process_gives(num_workers: int) -> None:
    order = Order(50, 9, 0)

    def batches(workers: int) -> list[Any]:
        keys = keys_of_training(order, Split(microbatch=4), 0, 1, 0, 0, 12, 0)
        return list(Loader(Fetch(toys.Samples(50), None, 0), CPU, workers).read(keys))

    here, there = batches(0), batches(num_workers)
    assert len(here) == len(there) == 34
    assert all(
        torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other, strict=True)
    )


class Elsewhere(Listed):
    """Gives the number of the process that reads."""

    def __getitems__(self, indices: list[int]) -> Any:
        return torch.tensor([os.getpid()])


def test_only_tensors_are_gathered_here_whatever_num_workers_says() -> None:
    keys = [(0, torch.tensor([1]))]
    (pid,) = Loader(Fetch(Elsewhere(), None, 0), CPU, 1).read(iter(keys))
    assert pid.item() != os.getpid()
    tensors = Loader(Fetch(TensorDataset(torch.arange(3)), None, 0), CPU, 2).read(iter(keys))
    next(tensors)
    assert not loader_processes()


def loader_processes() -> list[int]:
    """Return the processes that were forked from this one, as PyTorch's loader processes are."""
    own = Path("/proc/self/cmdline").read_bytes()
    return [pid for pid in toys.living_children() if Path(f"/proc/{pid}/cmdline").read_bytes() == own]


def test_an_early_end_waits_for_what_is_being_read() -> None:
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
    assert read == before  # nobody reads on
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
def test_a_bad_sample_is_told_in_the_data_sets_own_words(
    raises: str, kind: type[Exception], words: str, num_workers: int
) -> None:
    loader = Loader(Fetch(toys.Samples(10, bad=7, raises=raises), None, 0), CPU, num_workers)
    batches = loader.read((0, torch.tensor([i])) for i in range(5, 10))
    assert [int(next(batches)[2]) for _ in range(2)] == [5, 6]
    with pytest.raises(kind) as caught:
        next(batches)
    assert words in str(caught.value)
    if isinstance(caught.value, UserCodeError):
        text = caught.value.traceback_text
        assert text.count("File ") == 1
        assert "engine_toys.py" in text
    assert not loader_processes()


def test_samples_that_do_not_fit_together_are_told() -> None:
    class Ragged(toys.Samples):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(index)

    batches = Loader(Fetch(Ragged(10), None, 0), CPU).read(iter([(0, torch.tensor([2, 3]))]))
    with pytest.raises(UserCodeError, match="stack expects each tensor to be equal size"):
        next(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_ends_the_run_on_all_ranks(num_workers: int, tmp_path: Path) -> None:
    job = make_job(data={"_target_": "Augmented", "bad": 900, "num_workers": num_workers}, checkpoint={"every": 1})
    ranks = launch(job, tmp_path, 2, timeout=40)
    kinds = sorted(str(rank.error and rank.error[0]) for rank in ranks)
    assert kinds == ["DataError", "WorkerLost"]
    (error,) = [rank.error for rank in ranks if rank.error and rank.error[0] == "DataError"]
    assert "digits.csv, row 900" in error[1]
    assert [rank.children for rank in ranks] == [[], []]


def test_loader_processes_leave_ctrl_c_to_the_trainer() -> None:
    seen: list[int] = []
    kept = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        loader = Loader(Fetch(toys.Samples(10), None, 0), CPU, 1)
        batches = loader.read((0, torch.tensor([i])) for i in range(10))
        next(batches)
        (pid,) = loader_processes()
        for _ in range(3):
            os.kill(pid, signal.SIGINT)
        assert int(next(batches)[2]) == 1
        # Python ends what is left with SIGTERM, and then waits for it.
        masks = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert not any(int(masks[mask], 16) >> (signal.SIGTERM - 1) & 1 for mask in ("SigIgn", "SigCgt"))
        assert len(list(batches)) == 8
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert not seen


# ---- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_with_any_number_of_loader_processes(tmp_path: Path) -> None:
    for name, workers, num_workers in (("none", 1, 0), ("two", 1, 2), ("one each", 3, 1)):
        job = make_job(
            data={"_target_": "Augmented", "num_workers": num_workers}, deterministic=True, epochs=2, log_every=3
        )
        ranks = succeed(job, tmp_path / name, workers)
        assert [rank.children for rank in ranks] == [[]] * workers
        assert_same_run(tmp_path / "none", tmp_path / name)


def test_random_layers_do_not_see_who_reads(tmp_path: Path) -> None:
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


def test_loader_processes_end_with_a_run_that_is_stopped(tmp_path: Path) -> None:
    job = make_job(data={"_target_": "Augmented", "num_workers": 2}, epochs=2)
    ranks = succeed(job, tmp_path, 2, scripts={0: Script(stop_after=3)})
    assert [rank.children for rank in ranks] == [[], []]


# ---- what a data object must have -----------------------------------------------------------------------------------


class Given:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "has no attribute `train`"),
        ({"train": iter([1, 2])}, "a list_iterator; a map-style data set"),
        ({"train": []}, r"Given.train is empty"),
        ({"train": [1], "val": []}, r"Given.val is empty"),
        ({"train": [1], "val": {"good": [1], "none": []}}, r"Given.none is empty"),
        ({"train": [1], "test": 5}, "a int; a map-style data set"),
    ],
)
def test_what_a_data_object_lacks_is_told(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Data.of(Given(**parts))


def test_parts_of_a_data_object_may_be_left_out() -> None:
    data = Data.of(Given(train=[1, 2]))
    assert (data.val, data.test, data.collate, data.num_workers) == ({}, {}, None, 0)
    data = Data.of(Given(train=[1], val=[2], test={"a": [3]}, num_workers=None))
    assert (data.val, data.test, data.num_workers) == ({"": [2]}, {"a": [3]}, 0)


def test_batches_of_any_nest_keep_their_shape() -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", "x y")
    batch = {"a": [torch.ones(1), "text"], "b": (Pair(torch.ones(2), 3), None)}
    doubled = tree_map(lambda tensor: tensor * 2, batch)
    assert doubled["a"][0].tolist() == [2]
    assert doubled["a"][1] == "text"
    assert isinstance(doubled["b"][0], Pair)
    assert doubled["b"][0].x.tolist() == [2, 2]
    picture, label = channels_last((torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.long)))
    assert picture.is_contiguous(memory_format=torch.channels_last)
    assert label.is_contiguous()


def test_augmentation_on_the_device_depends_on_seed_epoch_and_sample_alone() -> None:
    """Would be wrong: another number of workers, or of loader processes, trains on other pictures."""
    fetch = Fetch(TensorDataset(torch.arange(40)), None, 3, lambda batch, seeds: (batch[0] * 0, seeds))
    reader = Fetch(toys.Samples(40), None, 3, lambda batch, seeds: (batch[0] * 0, seeds))

    def seeds(fetch: Fetch, workers: int, epoch: int, *parts: list[int]) -> list[int]:
        keys = [(epoch, torch.tensor(part)) for part in parts]
        return [int(seed) for batch in Loader(fetch, CPU, workers).read(iter(keys)) for seed in batch[1]]

    whole = seeds(fetch, 0, 0, [5, 6, 7, 8])
    assert whole == seeds(reader, 0, 0, [5], [6, 7, 8]) == seeds(reader, 2, 0, [5, 6], [7, 8])
    assert len(set(whole)) == 4
    assert not set(whole) & set(seeds(fetch, 0, 1, [5, 6, 7, 8]))
