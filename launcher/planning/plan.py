"""The plan of a run: what `train` will do, as a value. Nothing is created by making one.

Joins the engine's estimate of the job with what the place has that it is to run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.clusters import base, capacity
from launcher.clusters.pricing.rates import rate_of
from launcher.config import Job
from launcher.errors import ConfigError
from launcher.formatting import count, size
from launcher.money import Rate
from launcher.startup_timing import Marks

if TYPE_CHECKING:
    from launcher.engine.estimate import Estimate


@dataclass(frozen=True)
class Placement:
    """Where the workers sit. `cluster` is the configuration's word; CPUs and GPUs are those of the whole cluster."""

    cluster: str
    description: str
    cpus: int
    gpus: int
    workers: int
    device: str
    cpus_per_worker: float
    gpus_per_worker: float
    nodes: int = 1

    @property
    def in_process(self) -> bool:
        """Whether the job runs in the process of the command, without Ray."""
        return base.named(self.cluster).in_process


@dataclass(frozen=True)
class Batches:
    """Batch arithmetic. `per_worker` and `microbatches` are the largest of any worker."""

    global_batch_size: int
    per_worker: int
    microbatch_size: int
    microbatches: int
    steps_per_epoch: int
    epochs: float
    steps: int
    last_batch_size: int


@dataclass(frozen=True)
class Plan:
    """What `train` would do. Bytes are those of one worker; `memory["total"]` leaves out the framework's own."""

    machines: Placement
    batches: Batches
    data: dict[str, int]
    parameters: int
    memory: dict[str, int]
    strategy: str
    communication: str
    gradient_bytes_per_step: int
    flops_per_sample: float | None
    tags: tuple[str, ...]
    usd_per_hour: float
    rate: Rate | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def headline(self) -> str:
        """Return the one line that `train` begins with."""
        m, b = self.machines, self.batches
        workers = count(m.workers, f"{'GPU' if m.device == 'cuda' else 'CPU'} worker")
        return (
            f"{workers} ({m.description}), global batch {b.global_batch_size} = {self._shares()}, "
            f"{count(b.steps, 'step')} ({count(b.epochs, 'epoch')} of {b.steps_per_epoch})"
            + (f", {self.usd_per_hour:.2f} USD/h" if self.rate is not None else "")
        )

    def _shares(self) -> str:
        workers, most = self.machines.workers, self.batches.per_worker
        even = workers * most == self.batches.global_batch_size
        return f"{workers} x {'' if even else 'at most '}{most}"

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as (what, value) for people."""
        m, b = self.machines, self.batches
        memory = ", ".join(f"{name} {size(part)}" for name, part in self.memory.items())
        length = f"{count(b.steps, 'step')} = {count(b.epochs, 'epoch')} of {b.steps_per_epoch}"
        accumulated = f" in {b.microbatches} microbatches of {b.microbatch_size}" if b.microbatches > 1 else ""
        return [
            ("where", m.description),
            ("workers", f"{m.workers} on {m.device}, {m.cpus_per_worker:g} CPU and {m.gpus_per_worker:g} GPU each"),
            ("global batch", f"{b.global_batch_size} samples = {self._shares()}{accumulated}"),
            ("length", f"{length} (the last batch has {b.last_batch_size})"),
            ("data", ", ".join(f"{name} {count:,}" for name, count in self.data.items())),
            ("network", f"{self.parameters:,} parameters"),
            ("memory a worker", memory),
            ("strategy", self.strategy + _strategy_note(self.strategy)),
            ("communication", self.communication if m.workers > 1 else "none (one worker)"),
            ("tags", ", ".join(self.tags)),
            ("cost", f"{self.usd_per_hour:.2f} USD/h"),
            *(("note", note) for note in self.notes),
        ]


def _strategy_note(strategy: str) -> str:
    from launcher.engine.strategies.kinds.base import kinds

    return next((kind.plan_note for kind in kinds() if kind.name == strategy), "")


def machines_of(job: Job, ranks: int | None = None) -> Placement:
    """Decide where the workers sit and how many there are.

    Args:
        ranks: how many processes torchrun or srun started, or None.

    Raises:
        ResourceError: the machine can never hold what was asked for.
        ConfigError: several workers without anything that starts them, or VMs that nothing creates.
    """
    kind = base.kind_of(job.cluster)
    if job.cluster.size is not None and not kind.is_rented:
        raise ConfigError(
            f"cluster.size={job.cluster.size} asks for VMs of Azure, and cluster={job.cluster.kind} has none: "
            "cluster=azure rents them, and `launch plan` with the same words says what they would do and cost. Leave "
            "cluster.size out to run here."
        )
    if ranks is not None and not kind.is_batch:
        kind = base.in_process()
    found = kind.machines(job.cluster)
    if not found.is_this_machine:
        return place_on(job, found.nodes, found.where, kind.name)
    cpus, gpus = int(sum(node.cpus for node in found.nodes)), int(sum(node.gpus for node in found.nodes))
    scaling = job.scaling
    use_gpu = _uses_gpu(job, gpus)
    device = "cuda" if use_gpu else "cpu"
    if kind.in_process:
        if ranks is None and scaling.workers not in ("auto", 1):
            raise ConfigError(
                f"scaling.workers={scaling.workers} was asked for with cluster={kind.name}, which is this one process. "
                f"Use cluster=local, or start them with: torchrun --nproc-per-node={scaling.workers} -m launcher ..."
            )
        where = found.where if ranks is None else f"{ranks} processes started by torchrun or srun"
        return Placement(kind.name, where, cpus, gpus, ranks or 1, device, scaling.cpus_per_worker, float(use_gpu))
    gpus_per_worker = _gpus_per_worker(job, use_gpu)
    workers = scaling.workers
    if workers == "auto":
        # On CPUs two workers show what there is to show; more would only share the same cores.
        workers = max(1, int(gpus / gpus_per_worker) if use_gpu else min(2, int(cpus / scaling.cpus_per_worker)))
    capacity.check_feasible(scaling.min_workers or workers, scaling.cpus_per_worker, gpus_per_worker, (cpus, gpus))
    return Placement(kind.name, found.where, cpus, gpus, workers, device, scaling.cpus_per_worker, gpus_per_worker)


def place_on(job: Job, nodes: Sequence[capacity.Node], where: str, cluster: str) -> Placement:
    """Return how many workers there are on the nodes of a cluster.

    Raises:
        ResourceError: the nodes can never hold what was asked for.
    """
    scaling = job.scaling
    cpus, gpus = int(sum(node.cpus for node in nodes)), int(sum(node.gpus for node in nodes))
    use_gpu = _uses_gpu(job, gpus)
    gpus_per_worker = _gpus_per_worker(job, use_gpu)
    workers = scaling.workers
    if workers == "auto":
        most = int(capacity.worker_capacity(nodes, scaling.cpus_per_worker, gpus_per_worker))
        workers = max(1, most if use_gpu else min(2, most))
    capacity.check_feasible_on(scaling.min_workers or workers, scaling.cpus_per_worker, gpus_per_worker, nodes)
    device = "cuda" if use_gpu else "cpu"
    return Placement(cluster, where, cpus, gpus, workers, device, scaling.cpus_per_worker, gpus_per_worker, len(nodes))


def _uses_gpu(job: Job, gpus: int) -> bool:
    return job.scaling.device == "cuda" or (job.scaling.device == "auto" and gpus > 0)


def _gpus_per_worker(job: Job, use_gpu: bool) -> float:
    if not use_gpu:
        return 0.0
    return 1.0 if job.scaling.gpus_per_worker is None else job.scaling.gpus_per_worker


def make_plan(job: Job, ranks: int | None = None, marks: Marks | None = None, weights: str | None = None) -> Plan:
    """Look at the job and at where it is to run, and work out everything that follows.

    Args:
        ranks: how many processes torchrun or srun started, or None.
        weights: the place of those that the run begins with.

    Raises:
        RequestError: it cannot be done as asked; see `machines_of` and `engine.estimate`.
    """
    machines = machines_of(job, ranks)
    rate = rate_of(job.cluster, machines.nodes)
    marks = marks or Marks()
    marks.begin("imports")
    if machines.in_process:
        from launcher.engine.runtime import choose_device

        choose_device(job.scaling.device, 0)
    from launcher.engine.estimate import estimate

    marks.begin("check")
    plan = plan_on(job, machines, estimate(job, workers=machines.workers, weights=weights))
    return plan if rate is None else replace(plan, rate=rate, usd_per_hour=round(rate.usd_per_hour(), 6))


def plan_on(job: Job, machines: Placement, found: Estimate) -> Plan:
    """Join what the job needs with the machines that it is to run on.

    Raises:
        ConfigError: the batch arithmetic cannot be met.
    """
    from launcher.engine.build import build_split, check_batch
    from launcher.engine.order import Order
    from launcher.engine.strategies.kinds.base import kind_of

    check_batch(job, found.train_samples, machines.workers)
    trainer = job.trainer
    order = Order(
        found.train_samples,
        trainer.global_batch_size,
        trainer.seed,
        trainer.overfit_batches,
        drop_last=trainer.drop_last,
    )
    share = build_split(job).share(trainer.global_batch_size, 0, machines.workers)
    steps = trainer.steps or trainer.epochs * order.steps_per_epoch
    profile = job.logging.profile
    if profile is not None and profile[1] > steps:
        raise ConfigError(f"logging.profile={profile}: the run has {steps} steps. Choose earlier ones.")
    microbatch = max(stop - start for start, stop in share)
    kept = {
        "parameters": found.parameter_bytes,
        "gradients": found.gradient_bytes,
        "optimizer": found.optimizer_bytes,
    }
    kind = kind_of(job.strategy, job.trust)
    memory = kind.memory(job.strategy, machines.workers, kept)
    memory["activations"] = found.activation_bytes_per_sample * microbatch
    travels, communication = kind.traffic(
        job.strategy, trainer, found.parameter_bytes, found.gradient_bytes, len(share)
    )
    compression = job.strategy.compression
    return Plan(
        machines=machines,
        batches=Batches(
            global_batch_size=trainer.global_batch_size,
            per_worker=share[-1][1] - share[0][0],
            microbatch_size=microbatch,
            microbatches=len(share),
            steps_per_epoch=order.steps_per_epoch,
            epochs=round(steps / order.steps_per_epoch, 4),
            steps=steps,
            last_batch_size=order.batch_size(order.steps_per_epoch - 1),
        ),
        data=_sizes(found.train_samples, found.val_samples, found.test_samples),
        parameters=found.parameters,
        memory={**memory, "total": sum(memory.values())},
        strategy=job.strategy.name + (f" with compression {compression}" if compression != "none" else ""),
        communication=communication,
        gradient_bytes_per_step=travels,
        flops_per_sample=found.flops_per_sample,
        tags=found.tags,
        notes=found.notes,
        usd_per_hour=0.0,
    )


def _sizes(train: int, val: dict[str, int], test: dict[str, int]) -> dict[str, int]:
    sizes = {"train": train}
    for kind, sets in (("val", val), ("test", test)):
        sizes.update({f"{kind}/{name}" if name else kind: count for name, count in sets.items()})
    return sizes
