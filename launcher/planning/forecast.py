"""Forecast a job on VMs before they exist: placement of the workers, and memory and time of each strategy.

The times are those of the cost model that also advises runs (`engine.cost`, `engine.strategies.kinds`). The memory of a
GPU and the fraction of its peak that is reached are estimates; docs/scaling.md lists what they exclude.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.clusters.pricing.nodes import Nodes
from launcher.config import Job, StrategyConfig
from launcher.engine.auto_strategy import ROOM, Candidate, choose
from launcher.engine.cost import MFU, Link
from launcher.engine.estimate import Estimate
from launcher.engine.peaks import peak_flops
from launcher.engine.strategies.kinds.base import DEFAULT, Network, kind_of, kinds, label
from launcher.errors import ConfigError, ResourceError
from launcher.formatting import count
from launcher.planning.plan import Placement, Plan

ASSUMED_GBIT = 8.0  # the bandwidth between VMs of a size whose network is unknown: the lowest of the catalogue
_SHORT_PASS = 5e-3  # seconds
_RECOMPUTE_FACTOR = 4 / 3  # activation checkpointing adds a forward pass, which takes half of a backward pass


@dataclass(frozen=True)
class ComputeTime:
    """The computing time of a worker per step, with the figures from which it is computed.

    Attributes:
        flops_per_sample: of the forward and backward pass, or None.
        flops_from: "the model" if the model defines them, or "counted".
        peak_flops: the peak of the GPU in FLOP/s, or None.
        mfu: the fraction of the peak that is reached.
        mfu_from: "assumed", or the name of the run that reached it.
        seconds: the time; None if one of the figures is unknown.
        passes: the number of microbatches in it.
    """

    flops_per_sample: float | None
    flops_from: str | None
    peak_flops: float | None
    mfu: float
    mfu_from: str
    seconds: float | None
    passes: int

    @property
    def is_launch_bound(self) -> bool:
        """Return whether a pass is so short that launching its kernels dominates. The times are then lower bounds."""
        return self.seconds is not None and self.seconds / self.passes < _SHORT_PASS


@dataclass(frozen=True)
class Forecast:
    """The memory and time of a strategy.

    Attributes:
        strategy: the label of the strategy.
        words: the overrides that select it.
        exact: whether the losses equal those of one worker, up to rounding.
        memory: bytes of one worker by purpose.
        needs, room: the sum of `memory`, and the memory that a worker may use, in bytes.
        fits: whether `needs` is at most `room`.
        largest_microbatch: the largest microbatch that fits, at most a worker's share of the batch; 0: none.
        bytes_per_step: the average bytes of weights and gradients that are reduced or gathered per step.
        seconds_per_step, communication_share: None if no prediction is possible.
    """

    strategy: str
    words: str
    exact: bool
    memory: dict[str, int]
    needs: int
    room: int
    fits: bool
    largest_microbatch: int
    bytes_per_step: int
    seconds_per_step: float | None
    communication_share: float | None


def place_workers(job: Job, nodes: Nodes) -> tuple[Placement, tuple[int, ...]]:
    """Return the placement of the workers, and the number of workers on each node.

    One node after another is filled, as Ray does.

    Raises:
        ConfigError: the workers use no GPU.
        ResourceError: the workers do not fit on the nodes.
    """
    scaling, vm = job.scaling, nodes.size
    each = 1.0 if scaling.gpus_per_worker is None else scaling.gpus_per_worker
    if scaling.device == "cpu" or each == 0:
        raise ConfigError(
            f"cluster.size={vm.name} is a GPU size, but scaling.device={scaling.device} with "
            f"scaling.gpus_per_worker={each:g} uses no GPU. Omit these two options.",
            key="cluster.size",
        )
    most = min(int(vm.devices / each), int(vm.vcpus / scaling.cpus_per_worker))
    if most == 0:
        raise ResourceError(
            f"A worker needs {count(scaling.cpus_per_worker, 'CPU')} and {count(each, 'GPU')}, but {vm.name} has only "
            f"{count(vm.vcpus, 'CPU')} and {count(vm.devices, 'GPU')}. Lower scaling.cpus_per_worker or "
            "scaling.gpus_per_worker, or choose another size (`launch sizes`)."
        )
    workers = most * nodes.nodes if scaling.workers == "auto" else scaling.workers
    if workers > most * nodes.nodes:
        raise ResourceError(
            f"scaling.workers={workers} was requested, but {count(nodes.nodes, vm.name)} can hold only "
            f"{most * nodes.nodes} ({most} each). Set cluster.nodes={-(-workers // most)}, or omit scaling.workers."
        )
    workers_per_node = tuple(min(most, max(0, workers - node * most)) for node in range(nodes.nodes))
    where = f"{nodes.nodes} x {vm.name} in {nodes.region}"
    cpus, gpus = vm.vcpus * nodes.nodes, vm.devices * nodes.nodes
    return Placement("nodes", where, cpus, gpus, workers, "cuda", scaling.cpus_per_worker, each), workers_per_node


def link_between(nodes: Nodes, workers_per_node: tuple[int, ...]) -> Link | None:
    """Return the link of the ring of all workers: Ethernet between nodes, PCI Express within a node.

    Returns:
        The link, or None for a single worker.
    """
    used, workers = sum(1 for number in workers_per_node if number), sum(workers_per_node)
    if workers < 2:
        return None
    hops = [(workers - used if used > 1 else workers, Link.pcie(nodes.size.pcie))]
    if used > 1:
        hops.append((used, Link.ethernet(nodes.size.network_gbit or ASSUMED_GBIT)))
    return Link.around(hops)


@dataclass(frozen=True)
class MeasuredMfu:
    """The fraction of a GPU's peak that a run reached (`throughput/mfu`)."""

    run: str
    mfu: float


def computing_of(
    job: Job, nodes: Nodes, plan: Plan, found: Estimate, reached: MeasuredMfu | None = None
) -> ComputeTime:
    """Return the computing time of a worker per step, from the FLOPs of the model and the peak of the GPU.

    Args:
        found: the engine's estimate, with `device_sizes`.
        reached: the MFU of a run of the same model; None: `cost.MFU` is assumed.
    """
    assert found.device_sizes is not None
    flops, source = found.flops_per_sample, "the model"
    if flops is None:
        flops, source = found.device_sizes.flops_per_sample, "counted"
    peak = peak_flops(nodes.size.gpu, job.trainer.precision)
    if peak is not None:
        peak *= nodes.size.gpus / nodes.size.devices  # the share of sizes with a fraction of a GPU
    mfu, origin = (MFU, "assumed") if reached is None else (reached.mfu, reached.run)
    seconds = None
    if flops is not None and peak is not None:
        share = min(1.0, plan.machines.gpus_per_worker)
        recompute = _RECOMPUTE_FACTOR if job.strategy.activation_checkpointing else 1.0
        seconds = flops * recompute * plan.batches.per_worker / (peak * share * mfu)
    return ComputeTime(flops, None if flops is None else source, peak, mfu, origin, seconds, plan.batches.microbatches)


def candidate_strategies(job: Job, workers: int) -> list[StrategyConfig]:
    """Return the job's strategy and its alternatives, in the order of the documentation."""
    given = [] if kind_of(job.strategy, job.trust).chooses else [job.strategy]
    others = [StrategyConfig()]
    if workers > 1 and not job.trainer.deterministic:
        others += [StrategyConfig(compression=word) for word in ("bf16", "powersgd")]
        others += [StrategyConfig(kind.name) for kind in kinds() if not kind.chooses and kind.name != DEFAULT]
    return list({label(config): config for config in [*others, *given]}.values())


def forecast(
    config: StrategyConfig,
    job: Job,
    nodes: Nodes,
    plan: Plan,
    link: Link | None,
    computing: ComputeTime,
    found: Estimate,
) -> Forecast:
    """Return the memory and time of one strategy.

    Args:
        link: see `link_between`.
        computing: see `computing_of`.
        found: the engine's estimate, with `device_sizes`.
    """
    sizes, batches, workers = found.device_sizes, plan.batches, plan.machines.workers
    assert sizes is not None
    kind = kind_of(config, job.trust)
    parts = {"parameters": found.parameter_bytes, "gradients": found.gradient_bytes, "optimizer": found.optimizer_bytes}
    memory = kind.memory_on_gpu(config, workers, nodes.nodes, parts)
    if kind.divides and workers > 1:
        memory["gathered"] = sizes.gathered
    elif sizes.saved_once:
        memory["cast weights"] = sizes.saved_once
    resident = sum(memory.values())
    each = sizes.saved_per_sample + sizes.largest_per_sample
    memory["activations"] = sizes.saved_per_sample * batches.microbatch_size
    memory["activation gradient"] = sizes.largest_per_sample * batches.microbatch_size
    needs = sum(memory.values())
    room = int(ROOM * nodes.size.device_memory_gib * 2**30 * min(1.0, plan.machines.gpus_per_worker))
    most = max(0, (room - resident) // each) if each else batches.per_worker
    step = None
    if computing.seconds is not None and kind.predicts(config):
        network = Network(
            found.parameter_bytes, found.gradient_bytes, sizes.powersgd, sizes.blocks, batches.microbatches
        )
        between = link or Link(0.0, 1.0)  # one worker: no communication
        step = kind.step(config, job.trainer.precision, network, computing.seconds, workers, between)
    sent = 0
    if workers > 1:
        sent, _ = kind.traffic(config, job.trainer, found.parameter_bytes, found.gradient_bytes, batches.microbatches)
        if config.compression == "powersgd":
            sent = sizes.powersgd
    compression = f" strategy.compression={config.compression}" if config.compression != "none" else ""
    return Forecast(
        strategy=label(config),
        words=f"strategy={config.name}{compression}",
        exact=kind.exact and not compression,
        memory=memory,
        needs=needs,
        room=room,
        fits=needs <= room,
        largest_microbatch=min(most, batches.per_worker),
        bytes_per_step=sent,
        seconds_per_step=None if step is None else step.seconds,
        communication_share=None if step is None else step.share,
    )


def choices(job: Job, forecasts: tuple[Forecast, ...]) -> tuple[str, str | None, str | None]:
    """Return three labels: the job's strategy, the fastest that fits, and the fastest exact strategy that fits."""

    def fastest(candidates: list[Forecast]) -> str | None:
        timed = [
            (one.seconds_per_step, one.strategy) for one in candidates if one.fits and one.seconds_per_step is not None
        ]
        return min(timed, key=lambda pair: pair[0])[1] if timed else None

    exact = [one for one in forecasts if one.exact]
    if kind_of(job.strategy, job.trust).chooses:
        candidates = [Candidate(one.strategy, one.needs, one.seconds_per_step) for one in exact]
        chosen = choose(candidates, exact[0].room).name
    else:
        chosen = label(job.strategy)
    return chosen, fastest(list(forecasts)), fastest(exact)
