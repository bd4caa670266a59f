"""Data of other people, through the command: what it trains with, and what it refuses before a run directory exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import Place

MODULE = """\
import os, signal
from collections import UserDict
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset


def pairs(n):
    x = torch.linspace(-1, 1, n)[:, None]
    return TensorDataset(x, 3 * x[:, 0])


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch):
        x, y = batch
        return {"loss": (self.net(x).squeeze(1) - y) ** 2}


class OfEncodings(Line):
    def training_step(self, batch):
        assert type(batch) is Encoding and batch.note == "kept"
        return super().training_step((batch.x, batch.y))


class Encoding(UserDict):
    def __init__(self, data, note):
        super().__init__(data)
        self.note = note

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Data:
    def __init__(self, num_workers=0):
        self.train, self.val, self.num_workers = pairs(40), pairs(8), num_workers


class Encoded(Data):
    def collate(self, samples):
        assert isinstance(samples, list) and len(samples[0]) == 2
        x, y = zip(*samples)
        return Encoding({"x": torch.stack(x), "y": torch.stack(y)}, "kept")


class Ignored(Data):
    sampler, drop_last, shuffle = object(), True, False


class Countable(IterableDataset):
    def __len__(self):
        return 10

    def __iter__(self):
        return iter(range(10))


class Loads(Data):
    def __init__(self):
        super().__init__()
        self.train = DataLoader(self.train, batch_size=4)


class Streams(Data):
    def __init__(self):
        super().__init__()
        self.train = Countable()


class Several(Data):
    def __init__(self):
        super().__init__()
        self.val = [pairs(8), pairs(9)]


class Odd(Dataset):
    def __init__(self, odd, bad):
        self.odd, self.bad = odd, bad

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return self.odd if index == self.bad else (torch.zeros(1), torch.zeros(()))


class Holes(Data):
    def __init__(self, bad, num_workers=0):
        super().__init__(num_workers)
        self.train = Odd(None, bad)


class Kills(Odd):
    def __getitem__(self, index):
        if index == self.bad and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Deadly(Data):
    def __init__(self):
        super().__init__(1)
        self.train = Kills(None, 7)
        self.train.odd = (torch.zeros(1), torch.zeros(()))
"""


def words(data: str, model: str = "Line", *more: str) -> tuple[str, ...]:
    own = (f"model._target_=reading_cases.{model}", f"data._target_=reading_cases.{data}")
    return ("--config-dir", "own", "experiment=reading_cases", *own, "run.name=a", *more)


EXPERIMENT = """\
# @package _global_
defaults: [override /model: null, override /data: null, override /cluster: none]
model: {_target_: reading_cases.Line}
data: {_target_: reading_cases.Data}
trainer: {epochs: 1, global_batch_size: 10, log_every: 1}
logging: {tensorboard: false, graph: false}
"""


def written(place: Place) -> Place:
    (place.directory / "reading_cases.py").write_text(MODULE)
    (place.directory / "own/experiment/reading_cases.yaml").write_text(EXPERIMENT)
    return place


@pytest.fixture
def project(here: Place) -> Place:
    return written(here)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_keeps_its_type_from_the_start_check_on(num_workers: int, project: Place) -> None:
    """Cases 10 and 24: a batch that is a mapping with attributes; `collate` gets a list of samples."""
    done = project.here(*words("Encoded", "OfEncodings", f"data.num_workers={num_workers}"))
    assert done.status == 0, done.err
    assert project.result("a")["steps"] == 4


@pytest.mark.parametrize(
    ("data", "names"),
    [("Loads", "DataLoader"), ("Streams", "stream(rank, world_size, seed, apply)"), ("Several", "mapping")],
)
def test_an_invalid_data_set_is_rejected_before_a_run_exists(data: str, names: str, project: Place) -> None:
    """Case 14."""
    done = project.here(*words(data))
    assert done.status == 2
    assert names in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (project.runs / "a").exists()


def test_a_sample_that_makes_no_batch_is_named_with_its_index(project: Place) -> None:
    """Case 15: at the start, where it is among the first samples, or later."""
    done = project.here(*words("Holes", "Line", "+data.bad=1"))
    assert done.status == 2
    assert "Sample 1 of train is None" in done.err
    assert not (project.runs / "a").exists()
    done = project.here(*words("Holes", "Line", "+data.bad=30", "data.num_workers=1"))
    assert done.status == 1
    assert "Sample 30 of train is None" in done.err
    assert "Traceback" not in done.err
    assert project.result("a")["status"] == "failed"


def test_attributes_without_effect_are_named_once(project: Place) -> None:
    """Case 17."""
    done = project.here(*words("Ignored"))
    assert done.status == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "`sampler`" in line]
    assert "trainer.drop_last" in line
    assert "trainer.shuffle" in line


@pytest.mark.slow  # tests/engine names the process, and tests/faults restarts a run, in every run of the suite
def test_a_killed_loader_process_is_named_and_the_run_restarted(place: Place) -> None:
    """Case 11, on Ray."""
    project = written(place)
    done = project.launch(
        *words("Deadly"), "cluster=local", "scaling.workers=2", "scaling.cpus_per_worker=0.5", seconds=150
    )
    assert done.status == 0, done.err
    assert "was killed (signal 9, usually out of memory): lower data.num_workers" in done.err
    assert "Traceback" not in done.err
    result: dict[str, Any] = project.result("a")
    assert (result["status"], result["restarts"], result["steps"]) == ("completed", 1, 4)
    assert Path(project.directory, "killed").exists()
    assert json.loads((project.runs / "a/result.json").read_text())["world_sizes"] == [2]
