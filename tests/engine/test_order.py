"""The order of samples, which is the same for any number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.engine.build import build_data, build_order
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
from launcher.errors import RequestError
from tests.support.engine_ranks import (
    Script,
    assert_same_run,
    make_job,
    succeed,
    trained,
)

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
    assert counts[0] == max(counts)  # the first rank has no sample only if no rank has one
    spans = [span for share in shares for span in share]
    assert all(stop - start <= (split.chunk or split.microbatch or size) for start, stop in spans)
    if split.chunk:  # cut by position, independent of the rank
        assert sorted(spans) == split.share(size, 0, 1)


@pytest.mark.parametrize("start", [(0, 0, 0), (0, 4, 4), (1, 2, 13), (1, 10, 21)])
def test_a_position_determines_the_next_samples(start: tuple[int, int, int]) -> None:
    order, split = Order(1037, 100, seed=4), Split(microbatch=9)
    epoch, batch, step = start

    def samples(workers: int, epoch: int, batch: int, step: int) -> list[tuple[int, int]]:
        """Return the samples of all ranks, step by step."""
        readers = [keys_of_training(order, split, r, workers, epoch, batch, 30, step) for r in range(workers)]
        found = []
        for now in range(step, 30):
            size = order.batch_size((batch + now - step) % 11)
            for rank, reader in enumerate(readers):
                for _ in split.share(size, rank, workers):
                    key = next(reader)
                    expected = order.epoch(key.epoch)[key.first : key.first + len(key.indices)]
                    assert torch.equal(key.indices, expected), "its position is not the position in the epoch"
                    found += [(key.epoch, int(index)) for index in key.indices]
        assert all(next(reader, None) is None for reader in readers)
        return found

    whole = samples(1, 0, 0, 0)
    rest = whole[epoch * 1037 + batch * 100 :]
    for workers in (1, 2, 3, 5):
        assert samples(workers, epoch, batch, step) == rest


def test_every_epoch_is_a_different_permutation_of_the_seed() -> None:
    orders = [Order(50, 10, seed).epoch(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert Order(50, 7, 0).epoch(1).tolist() == orders[1]  # independent of the batch size
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
    assert [(epoch, first, indices.tolist()) for epoch, first, indices in keys] == [(0, 2, [2, 3, 4]), (0, 5, [5, 6])]


# ---- lengths and blocks ---------------------------------------------------------------------------------------------


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
    assert torch.equal(indices.sort().values, torch.arange(count))  # each sample once
    assert torch.equal(indices, Order(count, batch, 5, lengths=lengths).epoch(epoch))
    assert count < 3 * batch or not torch.equal(indices, order.epoch(epoch + 1))
    batches = lengths[indices].split(batch)

    def padded(parts: Sequence[torch.Tensor]) -> int:
        return sum(int(part.max()) * len(part) for part in parts)

    shuffled = padded(lengths[Order(count, batch, 5).epoch(epoch)].split(batch))
    if count >= 100 * batch > 100:  # a window then has enough samples to sort
        waste, before = padded(batches) - int(lengths.sum()), shuffled - int(lengths.sum())
        assert waste < before / 4
    longest = [int(part.max()) for part in batches[:-1]]
    assert len(set(longest)) < 3 or longest != sorted(longest)  # the batches are not sorted by length


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


def seen(ranks: Sequence[Any]) -> tuple[list[int], int]:
    """Return the samples of training, and the amount of padding."""
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


# ---- trainer.shuffle, trainer.drop_last, weights --------------------------------------------------------------------


def test_without_shuffling_every_epoch_has_the_order_of_the_data_set() -> None:
    lengths, blocks = some_lengths(23, 9), torch.tensor([10, 13])
    for more in ({}, {"lengths": lengths}, {"blocks": blocks}):
        order = Order(23, 5, 0, shuffle=False, **more)  # type: ignore[arg-type]
        assert order.epoch(0).tolist() == order.epoch(3).tolist() == list(range(23))
    assert order.steps_per_epoch == 5


def test_the_smaller_last_batch_can_be_left_out() -> None:
    order = Order(23, 5, 0, drop_last=True)
    keys = list(keys_of_training(order, Split(), 0, 1, 0, 0, 8, 0))
    assert [(key.epoch, len(key.indices)) for key in keys] == [(0, 5)] * 4 + [(1, 5)] * 4
    assert order.epoch(0).tolist() == Order(23, 5, 0).epoch(0).tolist()
    assert Order(20, 5, 0, drop_last=True).steps_per_epoch == 4
    assert Order(23, 5, 0, only_batches=2, drop_last=True).steps_per_epoch == 2


def test_weights_draw_in_proportion() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 6.0, 0.0], dtype=torch.float64).repeat(1000)
    order = Order(6000, 50, 0, weights=weights)
    counts = torch.stack([torch.bincount(order.epoch(epoch) % 6, minlength=6) for epoch in range(20)])
    assert counts.sum(1).tolist() == [6000] * 20
    shares = counts.sum(0) / 120_000
    assert shares[[0, 2, 5]].tolist() == [0, 0, 0]
    assert torch.allclose(shares[[1, 3, 4]], torch.tensor([0.1, 0.3, 0.6]), atol=0.01)
    assert len({tuple(order.epoch(epoch).tolist()) for epoch in range(3)}) == 3
    assert torch.equal(order.epoch(1), Order(6000, 7, 0, weights=weights).epoch(1))
    assert not torch.equal(order.epoch(1), Order(6000, 50, 1, weights=weights).epoch(1))
    # A sample with nearly all of the weight is drawn repeatedly.
    one = torch.full((100,), 1e-12, dtype=torch.float64)
    one[42] = 1.0
    assert Order(100, 10, 0, weights=one).epoch(0).tolist() == [42] * 100


@pytest.mark.parametrize("trainer", [{"shuffle": False}, {"drop_last": True}, {"weights": True}])
def test_every_order_is_exact_after_a_resume_and_for_any_number_of_workers(
    trainer: dict[str, bool], tmp_path: Path
) -> None:
    def job(num_workers: int) -> Any:
        options: dict[str, Any] = dict(trainer)
        data = {"_target_": "Chosen", "weighted": options.pop("weights", False), "num_workers": num_workers}
        return make_job(model={"_target_": "Net", "note": True}, data=data, deterministic=True, epochs=2, **options)

    whole = succeed(job(0), tmp_path / "whole", 1)
    succeed(job(1), tmp_path / "parts", 2, scripts=Script(stop_after=3))
    succeed(job(0), tmp_path / "parts", 3)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    seen = [number for entry in trained(whole[0]) if entry[0] == "losses" for number in entry[1]]
    epochs = [seen[: len(seen) // 2], seen[len(seen) // 2 :]]
    if "shuffle" in trainer:
        assert epochs == [list(range(250))] * 2
    if "drop_last" in trainer:
        assert [len(set(epoch)) for epoch in epochs] == [200, 200]
    if "weights" in trainer:
        assert len(seen) == 500
        assert all(number % 2 == 0 for number in seen)


@pytest.mark.parametrize(
    ("data", "trainer", "words"),
    [
        ({"weighted": True}, {"shuffle": False}, r"trainer\.shuffle=false"),
        ({"weights": [1.0] * 3}, {}, r"\.weights .* 250 .*\(3,\)"),
        ({"weights": [-1.0] + [1.0] * 249}, {}, r"\.weights .* 250 [^(]*$"),
        ({"weights": [float("nan")] * 250}, {}, r"\.weights .* 250 [^(]*$"),
        ({"weights": [0.0] * 250}, {}, r"\.weights .* 250 [^(]*$"),
        ({"weights": "equal"}, {}, r"\.weights .*\(0, 0\)"),
        ({"streams": True, "weighted": True}, {}, "`weights`"),
        ({"streams": True}, {"shuffle": False}, r"data\.stream=false"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(data: dict[str, Any], trainer: dict[str, Any], words: str) -> None:
    job = make_job(data={"_target_": "Chosen", **data}, **trainer)
    with pytest.raises(RequestError, match=words):
        build_order(job, build_data(job))
