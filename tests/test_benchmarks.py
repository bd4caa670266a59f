"""The benchmarks in a tiny form: does each run, is what it writes well formed, is the same compared with the same?

What they measure is not judged here: the machine that runs the tests has other things to do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, throughput
from benchmarks import input as waiting
from benchmarks.figures import Demand, Figures, Spread, ratio
from benchmarks.harness import Failed, Turns

ROOT = Path(__file__).resolve().parent.parent
SAME = {"batch": [8, 1, 28, 28], "dtype": "float32", "workers": 2, "threads": 1, "parameters": 29322}


def run_benchmark(name: str, words: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> Any:
    """Run benchmarks/`name`.py as a user does. Return its JSON and its printed table."""
    file = folder / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *words, "--json", str(file)]
    # From another directory, because the command must not depend on the current directory.
    harness_environment = harness.surroundings() | (environment or {})
    done = subprocess.run(
        command, cwd=folder, env=harness_environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert content["benchmark"] == name
    check_environment(content["environment"], done.stdout)
    check_table(done.stdout, content["rows"])
    assert sorted(path.name for path in folder.iterdir()) == ["result.json"], "it wrote into the calling directory"
    return content


def check_environment(environment: dict[str, Any], printed: str) -> None:
    for key in ("date", "commit", "machine", "load"):
        assert environment[key], key
        assert environment[key] in printed
    assert environment["versions"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in printed


def check_table(printed: str, rows: list[dict[str, str]]) -> None:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "columns are not aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(rows[0])
    assert cells[2:] == [list(row.values()) for row in rows]


def is_spread(value: dict[str, Any], rounds: int) -> bool:
    return len(value["values"]) == rounds and 0 < value["low"] <= value["median"] <= value["high"]


# ---- each of them, tiny ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_throughput_compares_the_same_with_the_same(tmp_path: Path) -> None:
    peers = [name for name in ("accelerate", "lightning") if harness.available(name)]
    words = ["--rounds", "2", "--warm-up", "10", "--turn", "20", "--batch", "16", "--only", "launch", "plain", *peers]
    content = run_benchmark("throughput", words, tmp_path)
    systems = content["systems"]
    assert len(systems) == 2 + len(peers)
    for name, found in systems.items():
        assert is_spread(found["steps_per_second"], 2), name
        assert is_spread(found["cpu_milliseconds"], 2), name
        assert {fact: found["facts"][fact] for fact in SAME} == SAME, name
        assert found["facts"]["logged"] >= 1
        assert 0 < found["facts"]["last_loss"] < 2.3, f"{name} does not learn"
    # The printed ratio is the median of the ratios of the rounds.
    rates = [systems[name]["steps_per_second"]["values"] for name in (throughput.LAUNCH, "plain DDP")]
    ratios = [ours / plain for ours, plain in zip(*rates, strict=True)]
    assert content["ratios"]["plain DDP"]["values"] == pytest.approx(ratios)


@pytest.mark.slow
def test_throughput_of_a_gpt(tmp_path: Path) -> None:
    words = ["--network", "gpt", "--rounds", "1", "--warm-up", "2", "--turn", "8", "--batch", "2"]
    content = run_benchmark("throughput", [*words, "--only", "launch", "plain"], tmp_path)
    for name, found in content["systems"].items():
        assert found["facts"]["batch"] == [1, 256], name
        assert 0 < found["facts"]["last_loss"] < 6, f"{name} does not train"
    assert content["ratios"]["plain DDP"]["asked"] == 0.99


def test_startup_of_one_process(tmp_path: Path) -> None:
    content = run_benchmark("startup", ["--rounds", "1", "--only", "alone", "--experiment", "mnist_tiny"], tmp_path)
    for name, found in content["systems"].items():
        assert is_spread(found["first_step"], 1), name
        assert found["first_step"]["median"] < found["whole"]["median"], name
    ours = content["systems"]["launch cluster=none"]
    # Both clocks measure the start: that of the run starts shortly after the process and stops shortly after the step.
    assert abs(ours["first_step"]["median"] - ours["seconds_to_first_step"]["median"]) < 10
    assert [one["of"] for one in content["ratios"]] == ["launch cluster=none"] * 2


@pytest.mark.slow
def test_startup_of_two_workers(tmp_path: Path) -> None:
    content = run_benchmark("startup", ["--rounds", "1", "--only", "ray"], tmp_path)
    assert is_spread(content["ratios"][0], 1)
    assert (content["ratios"][0]["of"], content["ratios"][0]["asked"]) == ("launch, 2 workers", 1.1)


@pytest.mark.slow
def test_waiting_for_pictures(tmp_path: Path) -> None:
    content = run_benchmark("input", ["--rounds", "1", "--steps", "60", "--workers", "1"], tmp_path)
    assert len(content["pipelines"]) == 3
    for name, found in content["pipelines"].items():
        assert is_spread(found["samples_per_second"], 1), name
        assert 0 < found["waiting"]["median"] < 0.5, name


def test_checkpoints(tmp_path: Path) -> None:
    words = ["--parameters", "20000", "--batch", "4", "--rounds", "2", "--every", "2", "--folder", str(tmp_path.parent)]
    content = run_benchmark("checkpoint", words, tmp_path)
    assert is_spread(content["slowdown"], 2)
    assert is_spread(content["block"], 2)
    for one in content["rounds"]:
        assert one["bytes"] > 3 * 4 * 19000  # weights and both of AdamW's averages
        assert one["copy"] > 0
        assert one["block"] <= one["write"]


def test_data_wait_is_a_fraction_of_the_total_time(tmp_path: Path) -> None:
    points = [(20, 50.0, 0.9), (40, 100.0, 0.0), (60, 50.0, 0.3), (67, 10.0, 1.0)]
    names = ("step", "throughput/samples_per_second", "throughput/data_wait_fraction")
    lines = [json.dumps(dict(zip(names, point, strict=True))) for point in points]
    (tmp_path / "log").write_text("\n".join([json.dumps({"step": 20, "val/loss": 1.0}), *lines]))
    # Two intervals with equal counts of samples, of one and two seconds; the first and the unfinished one do not count.
    found = waiting.waits(tmp_path / "log")
    assert (found["waiting"], found["first"]) == (pytest.approx(0.2), 0.9)


@pytest.mark.slow
def test_exactness(tmp_path: Path) -> None:
    words = ["--rounds", "2", "--warm-up", "5", "--turn", "5", "--batch", "32", "--networks", "mlp"]
    content = run_benchmark("exactness", words, tmp_path)
    assert [one["workers"] for one in content["comparisons"]] == [1, 2]
    for one in content["comparisons"]:
        usual, exact = (one["steps_per_second"][key] for key in ("usual", "deterministic"))
        assert is_spread(usual, 2)
        assert is_spread(exact, 2)
        ratios = [fast / slow for fast, slow in zip(usual["values"], exact["values"], strict=True)]
        assert one["slow_down"]["values"] == pytest.approx(ratios)
        assert one["threads"]["deterministic"] == 1


# ---- the harness ----------------------------------------------------------------------------------------------------


def test_each_round_has_every_system_once_and_starts_with_another(tmp_path: Path) -> None:
    order: list[str] = []

    def measure(name: str) -> harness.Measure:
        def one(folder: Path) -> Figures:
            assert list(folder.iterdir()) == [], "a system finds what another has left"
            (folder / "left").touch()
            order.append(name)
            return {"rate": float(len(order))}

        return one

    found = harness.interleave({name: measure(name) for name in "ABC"}, 3, lambda text: None)
    assert order == list("ABCBCACAB")
    assert [figures["rate"] for figures in found["A"]] == [1, 6, 8]


def test_a_ratio_is_taken_within_each_round() -> None:
    fast = [{"rate": 10.0}, {"rate": 1.0}, {"rate": 30.0}]  # the machine was busy in the second round
    slow = [{"rate": 5.0}, {"rate": 0.5}, {"rate": 10.0}]
    times = ratio(fast, slow, "rate")
    assert times.values == [2, 2, 3]
    assert (times.median, times.text(1)) == (2, "2.0 (2.0 … 2.5)")


@pytest.mark.parametrize(
    ("demand", "value", "text"),
    [
        (Demand(least=1.2), 1.2, "≥ 1.2: met"),
        (Demand(least=1.2), 1.19, "≥ 1.2: NOT met"),
        (Demand(most=1.1), 1.0, "≤ 1.1: met"),
        (Demand(most=1.1), 1.2, "≤ 1.1: NOT met"),
        (Demand(), 1.0, ""),
    ],
)
def test_the_demand_is_printed_next_to_the_result(demand: Demand, value: float, text: str) -> None:
    assert demand.text(value) == text


@pytest.mark.parametrize(
    ("fact", "value"), [("batch", [4, 1, 28, 28]), ("threads", 2), ("parameters", 7), ("workers", 1), ("logged", 0)]
)
def test_unequal_work_is_rejected(fact: str, value: Any) -> None:
    same = SAME | {"logged": 3}
    throughput.check_like_for_like({"one": same, "other": same | {"channels_last": True}})
    with pytest.raises(Failed, match=f"other and one .*{fact}"):
        throughput.check_like_for_like({"one": same, "other": same | {fact: value}})


SYSTEM = """
import sys
from benchmarks.timed import Stopwatch
stopwatch = Stopwatch(*{turns})
for step in range({steps}):
    if step == {dies_at}:
        sys.exit("gone")
    stopwatch.note(lambda: {{"fact": step}})
"""


def stand_in(steps: int, dies_at: int = -1) -> harness.Command:
    return lambda turns, folder: [
        sys.executable,
        "-c",
        SYSTEM.format(turns=turns, steps=steps, dies_at=dies_at),
    ]


def test_systems_compute_in_turn() -> None:
    said: list[str] = []
    turns = Turns(rounds=3, warm_up=4, skipped=1, steps=2, systems=2)
    systems = {"one": stand_in(turns.total), "other": stand_in(turns.total)}
    found, facts = harness.take_turns(systems, turns, said.append, lambda folder: {"left": len(list(folder.iterdir()))})
    assert facts == {name: {"fact": 4, "left": 1} for name in systems}, (
        "it rests when the steps of the warm-up are done"
    )
    assert {name: len(figures) for name, figures in found.items()} == {"one": 3, "other": 3}
    assert all(figures["seconds"] > 0 and figures["cpu"] >= 0 for runs in found.values() for figures in runs)
    assert [line.split()[2].rstrip(":") for line in said[2:]] == ["one", "other", "other", "one", "one", "other"]


def test_a_system_with_too_few_steps_for_its_turns_is_detected() -> None:
    turns = Turns(rounds=3, warm_up=4, skipped=1, steps=2)
    with pytest.raises(Failed, match="broke off"):
        harness.take_turns({"one": stand_in(turns.total // 2)}, turns, lambda text: None, lambda folder: {})


@pytest.mark.parametrize(("dies_at", "what"), [(2, "before its first turn"), (8, "broke off")])
def test_the_error_about_a_dead_system_contains_its_output(dies_at: int, what: str) -> None:
    turns = Turns(rounds=3, warm_up=4, skipped=1, steps=2)
    with pytest.raises(Failed, match=f"(?s){what}.*gone"):
        harness.take_turns({"one": stand_in(turns.total, dies_at)}, turns, lambda text: None, lambda folder: {})


@pytest.mark.parametrize(
    ("code", "timeout", "message"),
    [
        ("import sys; print('what went wrong'); sys.exit(3)", 60.0, "ended with 3:\nwhat went wrong"),
        ("import time; time.sleep(60)", 0.3, "ran for more than 0.3 s"),
    ],
)
def test_a_system_that_fails_ends_the_benchmark(tmp_path: Path, code: str, timeout: float, message: str) -> None:
    with pytest.raises(Failed, match=message):
        harness.run([sys.executable, "-c", code], tmp_path, timeout=timeout)


def test_the_spread_of_one_round() -> None:
    assert Spread([2.0]).to_dict() == {"median": 2.0, "low": 2.0, "high": 2.0, "values": [2.0]}


def test_the_cost_of_comparing_replicas_is_measured(tmp_path: Path) -> None:
    content = run_benchmark("copies", ["--rounds", "2", "--steps", "2", "--networks", "MLP"], tmp_path)
    assert content["networks"]["MLP"]["comparing"]["median"] > 0
