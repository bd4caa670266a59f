"""`launch plan` for VMs of the catalogue: memory, time, cost, and the printed plan."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.pricing.nodes import Nodes, nodes_for
from launcher.config.schema import ClusterConfig, Job, ScalingConfig, StrategyConfig, TrainerConfig, cluster_section
from launcher.engine import cost
from launcher.engine.estimate import DeviceSizes, Estimate
from launcher.errors import ConfigError, ResourceError
from launcher.planning import forecast
from launcher.planning.nodes import NodePlan, node_plan_of
from launcher.planning.tables import text
from tests.support.command import TOY, Place

GOLDEN = Path(__file__).with_name("node_plan.txt")
MIB = 2**20
T4, A100, FOUR_T4, FOUR_A100 = "NC4as_T4_v3", "NC24ads_A100_v4", "NC64as_T4_v3", "NC96ads_A100_v4"


def network(parameters: int, per_sample: float, flops: float | None, **more: Any) -> Estimate:
    """Return the estimate of a model trained with AdamW. per_sample: MiB of activations, the largest has a quarter."""
    nbytes = 4 * parameters
    sizes = DeviceSizes(
        saved_per_sample=int(per_sample * MIB),
        saved_once=2 * parameters,
        largest_per_sample=int(per_sample * MIB / 4),
        gathered=parameters,
        powersgd=nbytes // 150,
        blocks=12,
        flops_per_sample=1e9,
    )
    return Estimate(
        train_samples=100_000,
        val_samples={"": 1_000},
        test_samples={},
        parameters=parameters,
        parameter_bytes=nbytes,
        gradient_bytes=nbytes,
        optimizer_bytes=2 * nbytes,
        activation_bytes_per_sample=int(per_sample * MIB),
        flops_per_sample=flops,
        tags=("train/loss", "val/loss"),
        device_sizes=replace(sizes, **more),
    )


# The estimate of `launch plan experiment=gpt2`: 124 million parameters, 1,024 tokens a sample, bfloat16.
GPT2 = network(123_587_328, 728.0, 875.17e9, largest_per_sample=int(196.5 * MIB), gathered=91_226_112)
SMALL = network(29_322, 0.1, 2e6)
HUGE = network(7_000_000_000, 900.0, 6 * 7e9 * 1024, gathered=1_000_000_000)


def job_for(cluster: dict[str, Any], strategy: str | StrategyConfig = "ddp", **trainer: Any) -> Job:
    given = {"global_batch_size": 64, "microbatch_size": 16, "precision": "float16", "steps": 1_000, **trainer}
    config = StrategyConfig(strategy) if isinstance(strategy, str) else strategy
    return Job(cluster=cluster_section(cluster), strategy=config, trainer=TrainerConfig(**given))


def planned(found: Estimate, job: Job) -> NodePlan:
    nodes = nodes_for(job.cluster, ask=False)
    return node_plan_of(job, nodes, *forecast.place_workers(job, nodes), found)


def fitting(made: NodePlan) -> dict[str, bool]:
    return {one.strategy: one.fits for one in made.forecasts}


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "size", "nodes", "microbatch", "fits", "most"),
    [
        (SMALL, T4, 1, 16, True, 64),
        (GPT2, T4, 1, 16, False, 13),
        (GPT2, T4, 1, 8, True, 13),
        (GPT2, A100, 1, 16, True, 64),
        (HUGE, A100, 1, 1, False, 0),
        (HUGE, A100, 8, 1, False, 0),
    ],
)
def test_fits_and_largest_microbatch(
    found: Estimate, size: str, nodes: int, microbatch: int, fits: bool, most: int
) -> None:
    made = planned(found, job_for({"size": size, "nodes": nodes}, microbatch_size=microbatch))
    assert (made.forecast.fits, made.forecast.largest_microbatch) == (fits, most)
    assert sum(made.forecast.memory.values()) == made.forecast.needs
    assert fits == (made.forecast.needs <= made.forecast.room)
    assert (f"trainer.microbatch_size={most}" in " ".join(made.notes)) == (not fits and most > 0)


def test_a_model_larger_than_a_gpu_is_sharded() -> None:
    """7 billion parameters with AdamW take 112 GB, which fit on GPUs with 80 GiB only with FSDP."""
    made = planned(HUGE, job_for({"size": A100, "nodes": 8}, "auto", microbatch_size=4))
    assert {name for name, fits in fitting(made).items() if fits} == {"fsdp"}
    assert (made.chosen, made.best) == ("fsdp", "fsdp")
    assert planned(HUGE, job_for({"size": A100, "nodes": 8}, microbatch_size=4)).notes[0].count("strategy=fsdp") == 1


def test_memory_is_that_of_one_worker() -> None:
    made = planned(GPT2, job_for({"size": A100, "nodes": 4}, "fsdp"))
    memory = made.forecast.memory
    assert memory["parameters"] == GPT2.parameter_bytes // 4
    assert memory["gathered"] == 91_226_112
    assert memory["activations"] == 16 * 728 * MIB
    assert "cast weights" not in memory, "FSDP casts gathered parameters, so there is no second copy"


def test_a_fraction_of_a_gpu_has_a_part_of_its_memory_and_peak() -> None:
    quarter, whole = "NC24lds_xl_RTXPRO6000BSE_v6", "NC144ds_xl_RTXPRO6000BSE_v6"
    small, large = (planned(SMALL, job_for({"size": size, "nodes": 2})) for size in (quarter, whole))
    assert small.plan.machines.workers == large.plan.machines.workers == 2
    assert small.forecast.room == pytest.approx(large.forecast.room / 4, rel=1e-6)
    assert small.computing.peak_flops == pytest.approx((large.computing.peak_flops or 0) / 4)
    assert any("NC24lds_xl" in note and "Gbit/s" in note for note in small.notes), (
        "the bandwidth of these sizes is unknown"
    )


# ---- time -----------------------------------------------------------------------------------------------------------


def test_predictions_equal_the_cost_model() -> None:
    """benchmarks/scaling.py compares the same model with measured steps, and runs are advised by it."""
    made = planned(GPT2, job_for({"size": A100, "nodes": 4}))
    computing = 875.17e9 * 16 / (312e12 * cost.MFU)
    link = cost.Link.ethernet(20)
    nbytes = GPT2.gradient_bytes
    expected = {
        "ddp": cost.predict(computing, nbytes, 4, link),
        "ddp, compression=bf16": cost.predict(computing, nbytes / 2, 4, link),
        "ddp, compression=powersgd": cost.predict(computing, nbytes // 150, 4, link, overlap=0.0),
        "fsdp": cost.predict_sharded(computing, nbytes / 2, nbytes, 4, link, messages=13),
        "local_sgd": cost.predict_rare(computing, nbytes, 4, link, 8),
        "diloco": cost.predict_rare(computing, nbytes, 4, link, 20),
    }
    assert made.computing.seconds == pytest.approx(computing)
    found = {one.strategy: (one.seconds_per_step, one.communication_share) for one in made.forecasts}
    assert found == {name: pytest.approx((step.seconds, step.share)) for name, step in expected.items()}
    assert made.best == min(expected, key=lambda name: expected[name].seconds)
    assert made.best_exact == "ddp"
    assert made.seconds == pytest.approx(1_000 * expected["ddp"].seconds)
    assert made.seconds_per_epoch == pytest.approx(-(-100_000 // 64) * expected["ddp"].seconds)


def test_only_the_last_microbatch_hides_gradients() -> None:
    whole = planned(GPT2, job_for({"size": A100, "nodes": 4}))
    parts = planned(GPT2, job_for({"size": A100, "nodes": 4}, microbatch_size=4))
    assert parts.computing.seconds == whole.computing.seconds
    hidden = 0.5 * (whole.computing.seconds or 0)
    difference = (parts.forecast.seconds_per_step or 0) - (whole.forecast.seconds_per_step or 0)
    assert difference == pytest.approx(hidden * 3 / 4)


def test_a_single_gpu_does_not_communicate() -> None:
    made = planned(GPT2, job_for({"size": A100}))
    assert made.link is None
    assert [one.strategy for one in made.forecasts] == ["ddp"]
    assert (made.forecast.communication_share, made.forecast.bytes_per_step) == (0.0, 0)
    assert made.forecast.seconds_per_step == made.computing.seconds


@pytest.mark.parametrize(
    ("size", "nodes", "latency", "bandwidth"),
    [
        (FOUR_A100, 1, cost.PCIE_LATENCY, 15.75e9),  # half the bandwidth of PCI Express 4.0
        (FOUR_T4, 1, cost.PCIE_LATENCY, 7.875e9),
        (FOUR_A100, 2, (2 * 50e-6 + 6 * 20e-6) / 8, 80e9 / 8 * 0.94),  # the network is slower
        (A100, 2, 50e-6, 20e9 / 8 * 0.94),
    ],
)
def test_the_slowest_link_limits_the_ring(size: str, nodes: int, latency: float, bandwidth: float) -> None:
    made = planned(GPT2, job_for({"size": size, "nodes": nodes}, microbatch_size=8))
    assert made.link is not None
    assert (made.link.latency, made.link.bandwidth) == (pytest.approx(latency), pytest.approx(bandwidth))


@pytest.mark.parametrize(
    ("found", "size", "precision", "source", "note"),
    [
        (GPT2, T4, "float16", "the model", None),
        (replace(GPT2, flops_per_sample=None), A100, "bfloat16", "counted", r" 0\.\d+ ms, "),
        (GPT2, T4, "bfloat16", "the model", r"\bT4\b.*\bbfloat16\b.*trainer\.precision=float16"),
        (network(10, 0.1, None, flops_per_sample=None), A100, "float32", None, r"\bflops_per_sample\b"),
        (SMALL, A100, "bfloat16", "the model", r" [\d.e-]+ ms, "),
    ],
)
def test_the_source_of_predicted_times(
    found: Estimate, size: str, precision: str, source: str | None, note: str | None
) -> None:
    made = planned(found, job_for({"size": size, "nodes": 2}, precision=precision, microbatch_size=4))
    assert made.computing.flops_from == source
    unknown = made.computing.peak_flops is None or source is None
    assert [value is None for value in (made.seconds, made.usd, made.best)] == [unknown] * 3
    assert made.plan.to_dict()["batches"]["per_worker"] == 32
    if note is not None:
        assert re.search(note, " ".join(made.notes))


def test_the_mfu_of_an_earlier_run_is_used() -> None:
    job = job_for({"size": A100})
    nodes = nodes_for(job.cluster, ask=False)
    made = node_plan_of(job, nodes, *forecast.place_workers(job, nodes), GPT2, forecast.MeasuredMfu("first", 0.5))
    assumed = planned(GPT2, job).computing
    assert assumed.mfu_from == "assumed"
    assert made.computing.mfu_from == "first"
    assert made.computing.seconds == pytest.approx((assumed.seconds or 0) * cost.MFU / 0.5)
    assert re.search(r"\bfirst, 50% .*\bA100 PCIe\b", text(made, "runs/x", 300))


def test_the_earlier_run_is_that_of_run_like(here: Place) -> None:
    assert here.here(*TOY, "run.name=first").status == 0
    result = here.runs / "first/result.json"
    facts = json.loads(result.read_text())
    result.write_text(json.dumps({**facts, "metrics": {**facts["metrics"], "throughput/mfu": 0.25}}))
    cluster = ("cluster.size=NC4as_T4_v3", "scaling.device=auto", "--offline", "--json", "--config-dir", "own")
    planned_run = here.here("plan", "run.like=first", *cluster)
    assert planned_run.status == 0, planned_run.err
    computing = json.loads(planned_run.out)["computing"]
    assert (computing["mfu"], computing["mfu_from"]) == (0.25, "first")


# ---- machines and money ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "scaling", "workers_per_node"),
    [
        ({"size": FOUR_T4, "nodes": 3}, {}, (4, 4, 4)),
        ({"size": FOUR_T4, "nodes": 3}, {"workers": 5}, (4, 1, 0)),
        ({"size": T4, "nodes": 2}, {"gpus_per_worker": 0.5}, (2, 2)),
        ({"size": FOUR_A100}, {"gpus_per_worker": 2.0, "device": "cuda"}, (2,)),
        ({"size": T4}, {"cpus_per_worker": 4.0}, (1,)),
    ],
)
def test_the_placement_of_workers(
    cluster: dict[str, Any], scaling: dict[str, Any], workers_per_node: tuple[int, ...]
) -> None:
    job = replace(job_for(cluster), scaling=ScalingConfig(**scaling))
    machines, found = forecast.place_workers(job, nodes_for(job.cluster, ask=False))
    assert (found, machines.workers, machines.device) == (workers_per_node, sum(workers_per_node), "cuda")


@pytest.mark.parametrize(
    ("scaling", "error", "expected"),
    [
        ({"workers": 9}, ResourceError, r"scaling\.workers=9 .* 8 \(4 .*cluster\.nodes=3"),
        ({"gpus_per_worker": 5.0}, ResourceError, "64 CPUs and 4 GPUs"),
        ({"cpus_per_worker": 65.0}, ResourceError, "64 CPUs and 4 GPUs"),
        ({"device": "cpu"}, ConfigError, r"scaling\.device=\w+ .*scaling\.gpus_per_worker=[01] "),
        ({"gpus_per_worker": 0.0}, ConfigError, r"scaling\.device=\w+ .*scaling\.gpus_per_worker=[01] "),
    ],
)
def test_impossible_placements_are_rejected(scaling: dict[str, Any], error: type[Exception], expected: str) -> None:
    job = replace(job_for({"size": FOUR_T4, "nodes": 2}), scaling=ScalingConfig(**scaling))
    with pytest.raises(error, match=expected):
        forecast.place_workers(job, nodes_for(job.cluster, ask=False))


def test_the_cost_of_a_run_and_its_budget() -> None:
    made = planned(GPT2, job_for({"size": A100, "nodes": 4, "budget_usd": 1.0}))
    rate = 4 * 3.673 + 0.192
    assert made.nodes.usd_per_hour == pytest.approx(rate)
    assert made.usd == pytest.approx((made.seconds or 0) / 3600 * rate)
    budget = made.budget
    assert budget is not None
    assert budget.hours == pytest.approx(1 / rate, abs=1e-4)
    assert budget.enough is False
    assert any("cluster.budget_usd=1 " in note for note in made.notes)
    enough = planned(GPT2, job_for({"size": A100, "nodes": 4, "budget_usd": 1_000.0}))
    assert enough.budget is not None
    assert enough.budget.enough is True
    assert not any("budget_usd" in note for note in enough.notes)


def test_an_unknown_price_is_reported() -> None:
    made = planned(GPT2, job_for({"size": A100, "nodes": 2, "region": "westus3"}))
    facts = made.to_dict()
    assert (facts["nodes_usd_per_hour"], facts["usd_per_hour"], facts["usd"]) == (None, None, None)
    assert facts["head_usd_per_hour"] == 0.192
    assert any(re.search(r"Standard_NC24ads_A100_v4 .*westus3 .*eastus\b", note) for note in made.notes)
    assert "unknown" in text(made, "runs/x", 120)


# ---- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_the_printed_plan() -> None:
    """Golden text. To update it: `t.GOLDEN.write_text(t.printed())`, where `t` is this module."""
    assert printed() == GOLDEN.read_text()


def printed() -> str:
    cluster = {"size": FOUR_A100, "nodes": 2, "spot": "prefer", "budget_usd": 1.0}
    job = job_for(cluster, precision="bfloat16", global_batch_size=256, microbatch_size=16)
    return text(planned(GPT2, job), "runs/gpt2", 120) + "\n"


@pytest.mark.parametrize("width", [40, 80, 300])
def test_names_are_not_truncated(width: int) -> None:
    """Users copy them. On a narrow terminal they are wrapped."""
    lines = text(planned(GPT2, job_for({"size": A100, "nodes": 4})), "runs/gpt2", width)
    assert "…" not in lines
    assert max(len(line) for line in lines.splitlines()) <= width


def test_the_plan_as_json(here: Place) -> None:
    words = (*TOY, "scaling.device=auto", "cluster.size=Standard_NC64as_T4_v3", "cluster.nodes=2", "--offline")
    planned_run = here.here("plan", *words, "--json")
    assert planned_run.status == 0, planned_run.err
    plan = json.loads(planned_run.out)
    whole, name, flag = int, str, bool
    schema: dict[str, Any] = {
        "run": name,
        "directory": name,
        "machines": {"cluster": name, "description": name, "cpus": whole, "gpus": whole, "workers": whole},
        "batches": {"global_batch_size": whole, "per_worker": whole, "microbatches": whole, "steps": whole},
        "parameters": whole,
        "gradient_bytes_per_step": whole,
        "nodes": {"size": name, "count": whole, "gpu": name, "head_size": name, "region": name, "spot": flag},
        "link": {"latency": float, "bandwidth": float},
        "computing": {"mfu": float, "mfu_from": name},
        "strategies": list,
        "chosen": name,
        "fits": flag,
        "nodes_usd_per_hour": float,
        "head_usd_per_hour": float,
        "usd_per_hour": float,
        "prices": {"Standard_NC64as_T4_v3": {"source": name, "date": name, "usd_per_hour": float}},
        "prices_from": name,
        "quotas": list,
        "would_create": list,
        "notes": list,
    }

    def check(value: Any, expected: Any, at: str) -> None:
        if isinstance(expected, dict):
            for key, inner in expected.items():
                check(value[key], inner, f"{at}.{key}")
        else:
            assert isinstance(value, expected), at

    check(plan, schema, "plan")
    assert plan["nodes"]["workers"] == [4, 4]
    assert plan["machines"]["workers"] == 8
    assert plan["usd_per_hour"] == pytest.approx(2 * 4.352 + 0.192)
    for one in plan["strategies"]:
        check(one, {"strategy": name, "memory": dict, "needs": whole, "fits": flag, "bytes_per_step": whole}, "one")
    assert [one["vcpus"] for one in plan["quotas"]] == [128, 4, 132]
    assert here.files() == set(), "a plan creates nothing"


def test_the_plan_of_a_sweep_shows_the_first_trial(here: Place) -> None:
    words = ("plan", "--offline", "-m", *TOY, "optimizer.lr=0.1,0.2", "cluster.size=NC4as_T4_v3", "run.name=s")
    planned_run = here.here(*words)
    assert planned_run.status == 0, planned_run.err
    for part in (r"^trials +2 .*\boptimizer\.lr; .*\bval/loss$", r"^Quota ", r"runs/s/0\b"):
        assert re.search(part, planned_run.out, re.MULTILINE)
    found = json.loads(here.here(*words, "--json").out)
    assert found["grid"] == [["optimizer.lr=0.1"], ["optimizer.lr=0.2"]]
    assert found["plan"]["nodes"]["size"] == "Standard_NC4as_T4_v3"
    assert here.files() == set()


@pytest.mark.parametrize("flags", [[], ["-m", "optimizer.lr=0.1,0.2"]])
def test_other_verbs_reject_cluster_size(flags: list[str], here: Place) -> None:
    planned_run = here.here("train", *flags, *TOY, "cluster.size=NC4as_T4_v3")
    assert planned_run.status == 2
    assert re.search(r"cluster\.size=NC4as_T4_v3 .* cluster=none .* cluster=azure ", " ".join(planned_run.err.split()))
    assert "launch plan" in planned_run.err
    assert here.files() == set()


def test_retired_and_unknown_sizes(here: Place) -> None:
    for size, expected in (
        ("NC6s_v3", "2025-09-30. Use Standard_NC24ads_A100_v4 "),
        ("NC24ads_A10_v4", '"Standard_NC24ads_A100_v4"?'),
    ):
        planned_run = here.here("plan", *TOY, f"cluster.size={size}", "--offline")
        assert (planned_run.status, planned_run.out) == (2, "")
        assert expected in planned_run.err


def kinds(nodes: Nodes) -> dict[str, int]:
    return {one["kind"]: one["count"] for one in nodes.resources()}


def test_every_vm_has_a_network_interface_and_a_disk() -> None:
    found = kinds(nodes_for(ClusterConfig(size=A100, nodes=3), ask=False))
    assert (found["node"], found["head"]) == (3, 1)
    assert found["network interface"] == found["system disk"] == 4
    assert found["public address"] == 1
