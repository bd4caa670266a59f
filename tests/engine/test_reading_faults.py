"""Errors of data loading: samples that cannot be batched, loader processes that die, objects that are not data sets."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, TensorDataset

from launcher.engine.data import Loader
from launcher.engine.datasets import Data
from launcher.engine.failures import LoaderDied, translate
from launcher.engine.fetch import Fetch
from launcher.engine.order import Key
from launcher.engine.reading_check import notes_on_reading
from launcher.errors import DataError, LoaderLost, UserCodeError
from tests.support import engine_toys as toys
from tests.support.engine_ranks import launch, make_job

CPU = torch.device("cpu")


class Listed(Dataset[Any]):
    """Every sample is `usual`, except that the sample with index `bad` is `odd`."""

    def __init__(self, usual: Any, odd: Any, bad: int = 50) -> None:
        self.usual, self.odd, self.bad = usual, odd, bad

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        return self.odd if index == self.bad else self.usual


def read(dataset: Any, collate: Any = None, num_workers: int = 0) -> Any:
    loader = Loader(Fetch(dataset, collate, 0, name="train"), CPU, num_workers)
    return next(loader.read(iter([Key(0, 0, torch.tensor([3, 50, 7, 14, 9]))])))


PAIR = (torch.zeros(4), 1.0)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("usual", "odd", "words"),
    [
        (PAIR, None, " 50 .* train .* None; .* tuple"),
        (PAIR, (None, 1.0), r" 50 .* train .* None .*\[0\]"),
        (PAIR, (torch.zeros(3), 1.0), r" 50 .* train .*\(3,\) .*\[0\]; .*\(4,\)"),
        (PAIR, (torch.zeros(4),), " 50 .* train .* 1 .*; .* 2"),
        ({"x": PAIR}, {"x": (PAIR[0], "one")}, r" 50 .* train .* str .*\['x'\]\[1\]; .* float"),
        ({"x": 1, "y": 2}, {"x": 1}, r" 50 .* train .*\['x'\]"),
        (np.zeros(2), np.zeros((2, 1)), r" 50 .* train .*\(2, 1\)"),
        (CPU, CPU, " 3 .* train .* device, "),
        (None, None, " 3 .* train .* None, "),
    ],
)
def test_a_sample_that_makes_no_batch_is_named(usual: Any, odd: Any, words: str, num_workers: int) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(Listed(usual, odd), num_workers=num_workers)
    assert "`collate`" in str(caught.value)


def test_samples_of_different_lengths_are_no_fault_where_collate_takes_them() -> None:
    assert read(Listed(torch.zeros(4), torch.zeros(3)), len) == 5

    def fails(samples: list[Any]) -> Any:
        return torch.stack([sample + 1 for sample in samples])

    with pytest.raises(UserCodeError) as caught:
        read(Listed(torch.zeros(4), None), fails)
    assert re.search(r" 50 .* train .* None", caught.value.traceback_text)
    assert "sample + 1" in caught.value.traceback_text
    with pytest.raises(UserCodeError) as caught:
        read(Listed(torch.zeros(4), torch.zeros(3)), fails)
    assert not re.search(r" 50 .* train ", caught.value.traceback_text)


class Buggy(Listed):
    """Raises an exception for its bad sample: a bug, or a ValueError with its own message."""

    def __init__(self, raises: str) -> None:
        super().__init__(PAIR, None)
        self.raises = raises

    def __getitem__(self, index: int) -> Any:
        if index == self.bad and self.raises == "number":
            return float("four")
        if index == self.bad and self.raises == "key":
            return {"x": 1}["label"]
        if index == self.bad:
            raise ValueError("table.csv, row 50: expected 4 numbers")
        return PAIR


def test_a_bug_is_reported_with_its_sample_and_bad_data_with_their_message() -> None:
    with pytest.raises(DataError, match=r"^table\.csv, row 50: expected 4 numbers$"):
        read(Buggy("words"))
    for raises, line in (("number", 'float("four")'), ("key", '["label"]')):
        with pytest.raises(UserCodeError) as caught:
            read(Buggy(raises))
        text = caught.value.traceback_text
        assert text.count("File ") == 1
        assert line in text
        assert re.search(r" 50 .*\btrain\b", text)


# ---- loader processes that die --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (-signal.SIGKILL, r" 9, .*data\.num_workers"),
        (3, r" 3 .*data\.num_workers=0"),
    ],
)
def test_a_loader_process_that_dies_is_a_lost_worker(ends: int, words: str, tmp_path: Path) -> None:
    """Case 11: `__getitem__` kills its own process, with two ranks."""
    ranks = launch(make_job(data={"_target_": "Deadly", "ends": ends}), tmp_path, 2, timeout=240)
    found = {str(rank.error and rank.error[0]): number for number, rank in enumerate(ranks)}
    assert found.keys() == {"LoaderLost", "WorkerLost"}
    error = ranks[found["LoaderLost"]].error
    assert error is not None
    assert re.search(rf" {found['LoaderLost']} .*{words}", error[1])


def test_the_remedy_depends_on_how_a_loader_process_ended() -> None:
    errors = {status: translate(LoaderDied(status), 3) for status in (-9, -7, -11, 0, 3)}
    assert all(isinstance(error, LoaderLost) and error.exit_status == 1 for error in errors.values())
    assert re.search(r" 3 .* 9, .*data\.num_workers(?!=0)", str(errors[-9]))
    assert re.search(r" 7, .*/dev/shm", str(errors[-7]))
    assert re.search(r" 11, .*data\.num_workers=0", str(errors[-11]))
    assert re.search(r" 3 .* 0 .*data\.num_workers=0", str(errors[0]))


def test_a_dead_loader_process_interrupts_nothing() -> None:
    """Would be wrong: an exception from a signal handler, in the middle of a collective."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = Loader(Fetch(toys.DeadlySamples(1, -signal.SIGKILL, ""), None, 0), CPU, 1).read(
        iter([Key(0, 0, torch.arange(1)), Key(0, 1, torch.arange(1, 2))])
    )
    with pytest.raises(LoaderDied):
        list(batches)
    assert signal.getsignal(signal.SIGCHLD) == before


# ---- objects that are no data set -----------------------------------------------------------------------------------


class Given:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Counted(Endless):
    def __len__(self) -> int:
        return 10


class Without(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return index


SET = TensorDataset(torch.arange(3))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train": DataLoader(SET)}, r"Given\.train .* DataLoader; .*trainer\.global_batch_size"),
        ({"train": Endless()}, r"`stream\(rank, world_size, seed, apply\)`"),
        ({"train": Counted()}, r"`stream\(rank, world_size, seed, apply\)`"),
        ({"train": SET, "val": Counted()}, r"Given\.val .* Counted; .*__getitem__"),
        ({"train": SET, "val": [SET, SET]}, r"Given\.val .* list; .*\{name: "),
        ({"train": SET, "test": (SET,)}, r"Given\.test .* tuple; .*\{name: "),
        ({"train": SET, "val": {"near": DataLoader(SET)}}, r"Given\.near .* DataLoader; "),
        ({"train": [SET, SET]}, "ConcatDataset"),
        ({"train": {"a": SET, "b": SET}}, "ConcatDataset"),
        ({"train": (torch.zeros(4, 2), torch.zeros(4))}, r"TensorDataset\(x, y\)"),
        ({"train": "data/train.csv"}, r"Given\.train .* str; "),
        ({"train": Listed}, r"Given\.train .* type; "),
        ({"train": lambda: SET}, r"Given\.train .* function; "),
        ({"train": Without()}, r"Given\.train .* Without; .*__getitem__"),
        ({"train": SET, "collate": "pad"}, r"Given\.collate .*'pad'"),
        ({"train": SET, "num_workers": -1}, r"Given\.num_workers .* -1"),
        ({"train_dataloader": lambda: None}, r"`train_dataloader`.*`train`"),
    ],
)
def test_objects_that_are_not_data_sets_are_rejected_with_a_remedy(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Data.of(Given(**parts))


def test_lists_of_samples_and_joined_sets_are_data_sets() -> None:
    sets: list[Any] = [
        [PAIR, PAIR],
        [torch.zeros(2)] * 3,
        ConcatDataset([SET, SET]),
        {0: PAIR, 1: PAIR},
        torch.zeros(3, 2),
    ]
    for train in sets:
        assert Data.of(Given(train=train)).train is train


# ---- notes of the start check on data loading -----------------------------------------------------------------------


def notes(**parts: Any) -> list[str]:
    return notes_on_reading(Data.of(Given(**parts)), 0)


def test_attributes_without_effect_are_named_once() -> None:
    """Case 17: `sampler`, `drop_last` and `shuffle` of the data."""
    (note,) = notes(train=SET, sampler=object(), drop_last=True, shuffle=False, batch_size=8, collate_fn=len)
    for name in ("`sampler`", "`drop_last`", "`shuffle`", "`batch_size`", "`collate_fn`"):
        assert note.count(name) == 1
    assert notes(train=SET, sampler=None) == []

    class Padding(Listed):
        @staticmethod
        def collate_fn(samples: list[Any]) -> Any:
            return samples

    (note,) = notes(train=Padding(PAIR, PAIR), val={"near": Padding(PAIR, PAIR)})
    assert "`train.collate_fn`" in note
    assert "`val/near.collate_fn`" in note
    assert notes(train=Padding(PAIR, PAIR), collate=Padding.collate_fn) == []


class Own(Listed):
    """Draws from its own generator."""

    def __init__(self, generator: Any) -> None:
        super().__init__(PAIR, PAIR)
        self.generator = generator

    def __getitem__(self, index: int) -> Any:
        return {"x": self.generator.random(2), "name": str(index)}


def test_samples_with_their_own_generator_are_noted_once() -> None:
    (note,) = notes(train=Own(np.random.default_rng(0)), val={"near": Own(np.random.default_rng(1)), "far": SET})
    assert "train, val/near " in note
    (note,) = notes(train=Listed(1, 1), val=Listed(1, 1), collate=lambda samples: np.random.default_rng().random(2))
    assert "train, val " in note
    assert notes(train=Own(np.random)) == []
    assert notes(train=toys.Samples(10), val=toys.Samples(10)) == []
    assert notes(train=Listed(float("nan"), 0), val=Listed({"x": np.array(["a"]), "y": None}, 0), collate=list) == []


def test_what_cannot_be_sent_from_a_loader_process_is_refused() -> None:
    grad = Listed(torch.ones(1, requires_grad=True), 0)
    for train, collate in ((Listed(lambda: 0, 0), list), (grad, lambda samples: samples[0] * 2)):
        assert notes(train=train, collate=collate) == []
        with pytest.raises(DataError, match=r"data\.num_workers=0"):
            notes(train=train, collate=collate, num_workers=1)
