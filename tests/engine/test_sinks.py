"""Sinks: metrics.jsonl, TensorBoard's file, log.txt."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn

from launcher.engine import entry, registry
from launcher.engine.console import CapturedStream, Console, capture_output
from launcher.engine.drawing import traced_step
from launcher.engine.runtime import Runtime
from launcher.engine.sinks import base
from launcher.engine.sinks.base import Position, Sink, SinkContext
from launcher.engine.sinks.jsonl import JsonLines
from launcher.engine.sinks.recording import Recording
from launcher.engine.sinks.tensorboard import TensorBoard
from launcher.errors import ConfigError, TrustError
from launcher.runs import RunDirectory
from tests.support import engine_toys as toys
from tests.support.engine_ranks import Puppet, Script, board, logged, make_job, succeed

# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[Any]:
    return [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in path.read_text().splitlines()]


def write(path: Path, steps: range, keep_until: int | None = None) -> None:
    sink = JsonLines()
    sink.open(SinkContext(RunDirectory(path), make_job(), keep_until))
    for step in steps:
        sink.scalars(Position(step, step / 9, step * 100, 0.0), {"train/loss": 1 / step})
    sink.close(True)


def test_values_of_lost_steps_are_removed_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write(tmp_path, range(1, 9))
    file.write_text(file.read_text() + '[1]\n{"no step": 1}\nnull\n{"step": 9, "tr')
    write(tmp_path, range(6, 8), keep_until=5)
    assert [line["step"] for line in lines(file)] == [1, 2, 3, 4, 5, 6, 7]
    write(tmp_path, range(1, 3))  # a new run with this name
    assert [line["step"] for line in lines(file)] == [1, 2]
    file.unlink()
    write(tmp_path, range(4, 5), keep_until=3)
    assert [line["step"] for line in lines(file)] == [4]


def test_every_line_is_on_the_disk_when_it_is_logged_and_is_json(tmp_path: Path) -> None:
    sink = JsonLines()
    sink.open(SinkContext(RunDirectory(tmp_path), make_job()))
    sink.scalars(Position(1, 0.5, 100, 2.0), {"train/loss": math.nan, "val/loss": math.inf})
    position = {"step": 1, "epoch": 0.5, "samples": 100, "time": 2.0}
    assert lines(tmp_path / "metrics.jsonl") == [{**position, "train/loss": None, "val/loss": None}]
    sink.close(True)


# ---- the protocol ---------------------------------------------------------------------------------------------------


def test_a_named_sink_receives_the_same_values(tmp_path: Path) -> None:
    """Would be wrong: a value that differs from metrics.jsonl, a call after close, or a missing close."""
    job = make_job(model="Showing", epochs=1, log_every=4, evaluate_every=6, logging={"sinks": ["recording", "noop"]})
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    entry.run(entry.Task("train", job, str(directory.path)), Runtime.single("cpu"), Puppet(Script(), directory, 0))
    calls = Recording.all.pop().calls
    names = [name for name, _ in calls]
    assert names[0] == "open"
    assert names[-1] == "close"
    assert calls[-1][1] == (True,)
    assert {"text", "scalars", "figures"} == set(names[1:-1])
    scalars = [{**asdict(at), **values} for name, (at, values) in (call for call in calls if call[0] == "scalars")]
    assert scalars == lines(directory.metrics)
    assert [line["step"] for line in scalars] == [4, 6, 8, 11]


class Elsewhere(Sink):
    """A sink of another package."""

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        pass


def point(value: str) -> EntryPoint:
    return EntryPoint("elsewhere", value, "launch.sinks")


@pytest.mark.parametrize(
    ("value", "trust", "error"),
    [
        (f"{__name__}:Elsewhere", ["tests"], None),
        (f"{__name__}:Elsewhere", [], TrustError),
        (f"{__name__}:Absent", ["tests"], ConfigError),
        (None, ["tests"], ConfigError),
    ],
)
def test_a_sink_of_another_package_is_used_where_it_is_named_and_trusted(
    value: str | None, trust: list[str], error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [point(value)] if value else [])
    job = make_job(logging={"sinks": ["elsewhere"]})
    job.trust = trust
    monkeypatch.setattr(base._SINKS, "_objects", dict(base._SINKS.all()))
    assert base.chosen_sinks(make_job()) == [JsonLines]
    if error is None:
        assert base.chosen_sinks(job) == [JsonLines, Elsewhere]
        return
    with pytest.raises(error):
        base.chosen_sinks(job)


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_values_of_metrics_jsonl(tmp_path: Path) -> None:
    succeed(make_job(epochs=1, log_every=3, logging={"tensorboard": True, "graph": True}), tmp_path, 2)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1  # one writer
    entries, shown = logged(tmp_path), board(tmp_path)
    for tag in ("train/loss", "train/accuracy", "train/learning_rate", "train/grad_norm"):
        assert dict(shown[tag]) == pytest.approx({step: entries[step][tag] for step in (3, 6, 9, 11)}, rel=1e-6)
    assert dict(shown["val/loss"]) == pytest.approx({11: entries[11]["val/loss"]}, rel=1e-6)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    expected = {
        *("throughput/samples_per_second", "throughput/data_wait_fraction", "memory/allocated_gib"),
        *("cluster/workers", "cluster/restarts", "val/accuracy"),
    }
    assert expected <= set(accumulator.Tags()["scalars"])
    assert accumulator.Tags()["graph"]
    assert sorted(accumulator.Tags()["tensors"]) == ["configuration/text_summary", "custom_scalars__config__"]


def shown(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"images": 0, "audio": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_the_layout_is_written_once_in_the_life_of_a_run(tmp_path: Path) -> None:
    """Would be wrong: a second layout of a resumed run, or one without the monitored tag."""
    for resumed_at in (None, 3):
        sink = TensorBoard()
        sink.open(SinkContext(RunDirectory(tmp_path), make_job(checkpoint={"monitor": "val/a/f1"}), resumed_at))
        sink.close(True)
    events = [event for file in sorted(tmp_path.glob("events*")) for event in EventFileLoader(str(file)).Load()]
    found = [value for event in events for value in event.summary.value if value.tag == "custom_scalars__config__"]
    [layout] = [Layout.FromString(value.tensor.string_val[0]) for value in found]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert list(charts) == ["loss", "f1"]
    assert all(re.match(charts["f1"][0], tag) for tag in ("train/f1", "val/f1", "val/a/f1"))
    assert not re.match(charts["f1"][0], "train/f10")


@pytest.mark.parametrize("several", [False, True])
def test_examples_of_the_model_are_shown_at_every_evaluation(several: bool, tmp_path: Path) -> None:
    data = {"_target_": "Points", "several": several}
    monitor = "val/near/loss" if several else "val/loss"
    job = make_job(model="Showing", data=data, epochs=1, evaluate_every=6, logging={"tensorboard": True})
    job.checkpoint.monitor = monitor
    ranks = succeed(job, tmp_path, 2)
    # By rank 0 alone, with its first microbatch (of 50, and of the 2 of 3), in evaluation mode.
    asked = [[entry[1:4] for entry in rank.record if entry[0] == "examples"] for rank in ranks]
    each = [(50, False, False), (2, False, False)] if several else [(50, False, False)]
    assert asked == [each * 2, []]
    assert len({entry[4] for entry in ranks[0].record if entry[0] == "examples"}) == 1  # equal random numbers
    accumulator, tags = shown(tmp_path), shown(tmp_path).Tags()
    for prefix in ("val/near/", "val/far/") if several else ("val/",):
        assert {f"{prefix}{name}" for name in ("picture", "grid", "figure")} <= set(tags["images"])
        assert f"{prefix}sound" in tags["audio"]
        assert f"{prefix}words/text_summary" in tags["tensors"]
        pictures = {name: accumulator.Images(f"{prefix}{name}") for name in ("picture", "grid", "figure")}
        assert [event.step for event in pictures["grid"]] == [6, 11]
        sizes = {name: (events[0].width, events[0].height) for name, events in pictures.items()}
        # 11 images of 4 x 5 in rows of 8, two pixels apart; 3 x 2 inches with 100 dots per inch.
        assert sizes == {"picture": (8, 8), "grid": (8 * 6 - 2, 2 * 7 - 2), "figure": (300, 200)}
        assert accumulator.Audio(f"{prefix}sound")[0].sample_rate == 8000


def test_examples_change_nothing_in_training(tmp_path: Path) -> None:
    for on in (True, False):
        model = {"_target_": "Showing", "dropout": 0.5}
        succeed(make_job(model=model, epochs=1, evaluate_every=2, logging={"tensorboard": on}), tmp_path / str(on))
    assert logged(tmp_path / "True") == logged(tmp_path / "False")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", r"KeyError: 'no picture' \(.*engine_toys.py, \w+ \d+\)"),
        ("number", r"val/odd .* int; .*\(C, H, W\)"),
        ("shape", r"val/odd .*\(5, 5\) .*float32; .*\(C, H, W\)"),
        ("metric", r": loss "),
        ("list", r"`examples`.* list\b"),
    ],
)
def test_failing_examples_are_reported_once_and_training_continues(kind: str, words: str, tmp_path: Path) -> None:
    model = {"_target_": "Showing", "kind": kind}
    (rank,) = succeed(make_job(model=model, epochs=1, evaluate_every=2, logging={"tensorboard": True}), tmp_path)
    notes = [event["text"] for event in rank.events if event["kind"] == "note" and "examples" in event["text"]]
    assert len(notes) == 1
    assert re.search(words, notes[0])
    assert max(logged(tmp_path)) == 11


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(toys.FEATURES, 1)

    def training_step(self, batch: Any) -> Any:
        return {"loss": self.layer(batch[0]).square().flatten()}


class Untraceable(Plain):
    def training_step(self, batch: Any) -> Any:
        raise RuntimeError("not under a tracer")


class Labelled(Plain):
    def training_step(self, batch: Any) -> Any:
        assert (batch["rate"], batch["name"]) == (8000, "x"), "tracing supports only tensors"
        return super().training_step(batch["pair"])


PAIR = (torch.ones(3, toys.FEATURES), torch.zeros(3))


@pytest.mark.parametrize(
    ("model", "batch", "drawn"),
    [
        (Plain(), PAIR, True),
        (Labelled(), {"pair": PAIR, "rate": 8000, "name": "x"}, True),
        (Untraceable(), PAIR, False),
    ],
)
def test_a_network_that_cannot_be_traced_is_not_drawn_and_trains(
    model: nn.Module, batch: Any, drawn: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    sink = TensorBoard()
    traced = traced_step(model, batch, torch.device("cpu"))
    assert (traced is not None) is drawn
    sink.open(SinkContext(RunDirectory(tmp_path), make_job(), drawing=traced))
    assert capfd.readouterr() == ("", ""), "it printed to the user"
    sink.scalars(Position(1, 0.1, 100, 0.0), {"train/loss": 0.5})
    sink.close(True)
    assert board(tmp_path) == {"train/loss": [(1, 0.5)]}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


# ---- prints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        (["a line\n"], [("a line", True)]),
        (["half ", "and half\n"], [("half and half", True)]),
        (["one\ntwo\nthr", "ee\n"], [("one", True), ("two", True), ("three", True)]),
        (["10%\r", "20%\r", "30%\n"], [("30%", True)]),  # a progress bar
        (["with carriage return\r\n"], [("with carriage return", True)]),
        (["\n"], [("", True)]),
    ],
)
def test_prints_become_lines(writes: list[str], expected: list[tuple[str, bool]]) -> None:
    seen: list[tuple[str, bool]] = []
    stream = CapturedStream(lambda text, whole: seen.append((text, whole)))
    for text in writes:
        assert stream.write(text) == len(text)
    assert seen == expected


def test_a_prompt_is_shown_before_its_line_ends() -> None:
    seen: list[tuple[str, bool]] = []
    stream = CapturedStream(lambda text, whole: seen.append((text, whole)))
    stream.write("(Pdb) ")
    stream.flush()
    stream.flush()
    assert seen == [("(Pdb) ", False)]


def test_a_logger_made_while_one_captures_writes_to_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    """A model may configure logging on import, which the start check does before the run starts."""
    seen: list[str] = []
    logger = logging.Logger("mine")
    with capture_output(lambda text, whole: seen.append(f"check: {text}")):
        logger.addHandler(logging.StreamHandler())
        logger.warning("one")
    with capture_output(lambda text, whole: seen.append(f"run: {text}")):
        logger.warning("two")
    logger.warning("three")
    assert seen == ["check: one", "run: two"]
    assert capsys.readouterr().err == "three\n"


class Collector:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def requests(self) -> frozenset[str]:
        return frozenset()

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def test_the_console_is_given_back_also_after_an_error(tmp_path: Path) -> None:
    kept, control = (sys.stdout, sys.stderr), Collector()

    def speak() -> None:
        with Console(tmp_path / "log.txt", 3, control) as console:
            print("to the output")
            print("to the errors, without an end", end="", file=sys.stderr)
            console.note("of the engine")
            raise KeyError

    with pytest.raises(KeyError):
        speak()
    assert (sys.stdout, sys.stderr) == kept
    assert [event["text"] for event in control.events] == ["to the output", "to the errors, without an end"]
    texts = [line.partition(" ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert texts == ["[rank 3] to the output", "[rank 3] of the engine", "[rank 3] to the errors, without an end"]
