"""What a job would need and take on VMs that are not there: where workers sit, memory and time by strategy.

The times are those of the cost model that runs are advised by (`engine.cost`, `engine.strategies.kinds`). What a GPU
needs and how much of its peak it reaches are estimates; docs/scaling.md lists what they exclude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.clusters.pricing.nodes import Nodes
from launcher.config import Job, StrategyConfig
from launcher.engine.cost import MFU, Link
from launcher.errors import ConfigError, ResourceError
from launcher.formatting import count
from launcher.planning.plan import Placement, Plan

if TYPE_CHECKING:
    from launcher.engine.estimate import Estimate

_QUICK = 5e-3  # seconds of a pass
_RECOMPUTED = 4 / 3  # with activation checkpointing: a second forward pass, half of what a backward pass takes


@dataclass(frozen=True)
class ComputeTime:
    """How long a worker computes in a step, and what that rests on.

    Attributes:
        flops_per_sample, flops_from: of forward and backward pass; "the model", or "counted" if the model does not
        define them.
        peak_flops, mfu: of the GPU, and the share of it that is reached.
        mfu_from: "assumed", or the run that reached it.
        seconds: None where one of the two is not known.
        passes: microbatches in them.
    """

    flops_per_sample: float | None
    flops_from: str | None
    peak_flops: float | None
    mfu: float
    mfu_from: str
    seconds: float | None
    passes: int

    @property
    def is_quick(self) -> bool:
        """Whether a pass computes so little that the launching of its kernels rules: times are lower bounds then."""
        return self.seconds is not None and self.seconds / self.passes < _QUICK


@dataclass(frozen=True)
class Forecast:
    """What a strategy would need and take.

    Attributes:
        words: what to put on the command line.
        exact: whether the losses are those of one worker, up to rounding.
        memory: bytes of one worker by what they are for.
        needs, room: their sum, and what a worker may fill; `fits` compares the two.
        largest_microbatch: the most samples at once that would fit, at most a worker's share; 0: none.
        bytes_per_step: of weights and gradients that are reduced or gathered, on the average.
        seconds_per_step, communication_share: None where no prediction is possible.
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
    """Return where the workers sit, and how many on each node: node after node is filled, as Ray packs them.

    Raises:
        ConfigError: workers that use no GPU.
        ResourceError: more than these nodes can hold.
    """
    scaling, vm = job.scaling, nodes.size
    each = 1.0 if scaling.gpus_per_worker is None else scaling.gpus_per_worker
    if scaling.device == "cpu" or each == 0:
        raise ConfigError(
            f"cluster.size={vm.name} is paid for its GPUs, and scaling.device={scaling.device} with "
            f"scaling.gpus_per_worker={each:g} uses none. Leave the two out."
        )
    most = min(int(vm.gpus / each), int(vm.vcpus / scaling.cpus_per_worker))
    if most == 0:
        raise ResourceError(
            f"A worker was to have {count(scaling.cpus_per_worker, 'CPU')} and {count(each, 'GPU')}, and a "
            f"{vm.name} has {vm.vcpus} and {vm.gpus}. Lower scaling.cpus_per_worker or scaling.gpus_per_worker, or "
            "take another size (`launch sizes`)."
        )
    workers = most * nodes.nodes if scaling.workers == "auto" else scaling.workers
    if workers > most * nodes.nodes:
        raise ResourceError(
            f"scaling.workers={workers} was asked for, and {count(nodes.nodes, vm.name)} can hold {most * nodes.nodes} "
            f"({most} each). Ask for cluster.nodes={-(-workers // most)}, or leave scaling.workers out."
        )
    workers_per_node = tuple(min(most, max(0, workers - node * most)) for node in range(nodes.nodes))
    where = f"{nodes.nodes} x {vm.name} in {nodes.region}"
    cpus, gpus = vm.vcpus * nodes.nodes, vm.gpus * nodes.nodes
    return Placement("nodes", where, cpus, gpus, workers, "cuda", scaling.cpus_per_worker, each), workers_per_node


def link_between(nodes: Nodes, workers_per_node: tuple[int, ...]) -> Link | None:
    """Return what the ring of all workers amounts to: Ethernet from node to node, PCI Express inside a node."""
    used, workers = sum(1 for here in workers_per_node if here), sum(workers_per_node)
    if workers < 2:
        return None
    hops = [(workers - used if used > 1 else workers, Link.pcie(nodes.size.pcie))]
    if used > 1:
        assert nodes.size.network_gbit is not None
        hops.append((used, Link.ethernet(nodes.size.network_gbit)))
    return Link.around(hops)


@dataclass(frozen=True)
class MeasuredMfu:
    """The share of a GPU's peak that a run reached (`throughput/mfu`)."""

    run: str
    mfu: float


def computing_of(
    job: Job, nodes: Nodes, plan: Plan, found: Estimate, reached: MeasuredMfu | None = None
) -> ComputeTime:
    """Return how long a worker computes in a step, by the network's FLOPs and the GPU's peak.

    reached: by a run of the same network; else `cost.MFU` is assumed.
    """
    from launcher.engine.peaks import peak_flops

    assert found.device_sizes is not None
    flops, source = found.flops_per_sample, "the model"
    if flops is None:
        flops, source = found.device_sizes.flops_per_sample, "counted"
    peak = peak_flops(nodes.size.gpu, job.trainer.precision)
    mfu, origin = (MFU, "assumed") if reached is None else (reached.mfu, reached.run)
    seconds = None
    if flops is not None and peak is not None:
        share = min(1.0, plan.machines.gpus_per_worker)
        again = _RECOMPUTED if job.strategy.activation_checkpointing else 1.0
        seconds = flops * again * plan.batches.per_worker / (peak * share * mfu)
    return ComputeTime(flops, None if flops is None else source, peak, mfu, origin, seconds, plan.batches.microbatches)


def candidate_strategies(job: Job, workers: int) -> list[StrategyConfig]:
    """Return the job's strategy and the others that it may have, in the order of the documentation."""
    from launcher.engine.strategies.kinds.base import DEFAULT, kind_of, kinds, label

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
    from launcher.engine.auto_strategy import ROOM
    from launcher.engine.strategies.kinds.base import Network, kind_of, label

    sizes, batches, workers = found.device_sizes, plan.batches, plan.machines.workers
    assert sizes is not None
    kind = kind_of(config, job.trust)
    parts = {"parameters": found.parameter_bytes, "gradients": found.gradient_bytes, "optimizer": found.optimizer_bytes}
    memory = kind.memory_on_gpu(config, workers, nodes.nodes, parts)
    if kind.divides and workers > 1:
        memory["gathered"] = sizes.gathered
    elif sizes.saved_once:
        memory["kept once"] = sizes.saved_once
    resident = sum(memory.values())
    each = sizes.saved_per_sample + sizes.largest_per_sample
    memory["activations"] = sizes.saved_per_sample * batches.microbatch_size
    memory["their gradient"] = sizes.largest_per_sample * batches.microbatch_size
    needs = sum(memory.values())
    room = int(ROOM * nodes.size.gpu_memory_gib * 2**30 * min(1.0, plan.machines.gpus_per_worker))
    most = max(0, (room - resident) // each) if each else batches.per_worker
    step = None
    if computing.seconds is not None and kind.predicts(config):
        network = Network(
            found.parameter_bytes, found.gradient_bytes, sizes.powersgd, sizes.blocks, batches.microbatches
        )
        between = link or Link(0.0, 1.0)  # one worker: nothing travels
        step = kind.step(config, job.trainer.precision, network, computing.seconds, workers, between)
    travels = 0
    if workers > 1:
        travels, _ = kind.traffic(
            config, job.trainer, found.parameter_bytes, found.gradient_bytes, batches.microbatches
        )
        if config.compression == "powersgd":
            travels = sizes.powersgd
    narrow = f" strategy.compression={config.compression}" if config.compression != "none" else ""
    return Forecast(
        strategy=label(config),
        words=f"strategy={config.name}{narrow}",
        exact=kind.exact and not narrow,
        memory=memory,
        needs=needs,
        room=room,
        fits=needs <= room,
        largest_microbatch=min(most, batches.per_worker),
        bytes_per_step=travels,
        seconds_per_step=None if step is None else step.seconds,
        communication_share=None if step is None else step.share,
    )


def choices(job: Job, forecasts: tuple[Forecast, ...]) -> tuple[str, str | None, str | None]:
    """Return the labels of what the job takes, of the quickest that fits, and of the quickest exact one that fits."""
    from launcher.engine.auto_strategy import Candidate, choose
    from launcher.engine.strategies.kinds.base import kind_of, label

    def quickest(among: list[Forecast]) -> str | None:
        timed = [(one.seconds_per_step, one.strategy) for one in among if one.fits and one.seconds_per_step is not None]
        return min(timed, key=lambda pair: pair[0])[1] if timed else None

    exact = [one for one in forecasts if one.exact]
    if kind_of(job.strategy, job.trust).chooses:
        candidates = [Candidate(one.strategy, one.needs, one.seconds_per_step) for one in exact]
        taken = choose(candidates, exact[0].room).name
    else:
        taken = label(job.strategy)
    return taken, quickest(list(forecasts)), quickest(exact)
