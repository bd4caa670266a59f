"""The plan of a run: what `launch train` will do, as a value. Creating a plan has no side effects.

A plan combines the engine's estimate of the job with the resources of the machines on which it will run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.clusters import base, capacity
from launcher.clusters.pricing.rates import rate_of
from launcher.config import Job
from launcher.engine.strategies.kinds.base import kind_of, kinds
from launcher.errors import ConfigError
from launcher.formatting import count, size
from launcher.money import Rate
from launcher.startup_timing import Marks

if TYPE_CHECKING:
    from launcher.engine.estimate import Estimate


@dataclass(frozen=True)
class Placement:
    """The machines and workers of a run.

    Attributes:
        cluster: the name of the cluster kind.
        description: of the machines, for messages.
        cpus, gpus: the totals of all machines.
        workers: the number of workers.
        device: "cuda" or "cpu".
        cpus_per_worker, gpus_per_worker: what each worker reserves.
        nodes: the number of machines.
    """

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
        """Return whether the job runs in the process of the command, without Ray."""
        return base.named(self.cluster).in_process


@dataclass(frozen=True)
class Batches:
    """The batch sizes and the length of a run. `per_worker` and `microbatches` are the maximum over the workers."""

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
    """What `launch train` would do.

    Attributes:
        machines: the machines and workers.
        batches: the batch sizes and the length of the run.
        data: the number of samples of each data set.
        parameters: the number of parameters of the model.
        memory: bytes of one worker by purpose; "total" excludes the memory of the framework itself.
        strategy, communication: descriptions for people.
        gradient_bytes_per_step: bytes of gradients that one worker sends per step.
        flops_per_sample: as the model defines it, or None.
        tags: the TensorBoard tags of the run.
        usd_per_hour: the cost of all machines; 0 without a rate.
        rate: the rate of the machines, or None.
        notes: further facts, one sentence each.
    """

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
        """Return the first line that `launch train` prints."""
        m, b = self.machines, self.batches
        workers = count(m.workers, f"{'GPU' if m.device == 'cuda' else 'CPU'} worker")
        return (
            f"{workers} ({m.description}), global batch {b.global_batch_size} = {self._shares()}, "
            f"{count(b.steps, 'step')} ({count(b.epochs, 'epoch')} of {b.steps_per_epoch})"
            + (f", {self.usd_per_hour:.2f} USD/h" if self.rate is not None else "")
        )

    def _shares(self) -> str:
        workers, most = self.machines.workers, self.batches.per_worker
        equal = workers * most == self.batches.global_batch_size
        return f"{workers} x {'' if equal else 'at most '}{most}"

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan as pairs of label and text."""
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
            ("memory per worker", memory),
            ("strategy", self.strategy + _strategy_note(self.strategy)),
            ("communication", self.communication if m.workers > 1 else "none (one worker)"),
            ("tags", ", ".join(self.tags)),
            ("cost", f"{self.usd_per_hour:.2f} USD/h"),
            *(("note", note) for note in self.notes),
        ]


def _strategy_note(strategy: str) -> str:
    return next((kind.plan_note for kind in kinds() if kind.name == strategy), "")


def machines_of(job: Job, ranks: int | None = None) -> Placement:
    """Determine the machines and the number of workers of a job.

    Args:
        ranks: the number of processes that torchrun or srun started, or None.

    Raises:
        ResourceError: the requested workers can never fit on the machines.
        ConfigError: several workers were requested for a single process, or `cluster.size` with a cluster kind that
            creates no VMs.
    """
    kind = base.kind_of(job.cluster)
    if job.cluster.size is not None and not kind.is_rented:
        raise ConfigError(
            f"cluster.size={job.cluster.size} requests Azure VMs, but cluster={job.cluster.kind} does not create any. "
            "Use cluster=azure to create them, or `launch plan` with the same arguments to see their time and cost. "
            "Omit cluster.size to run on this machine.",
            key="cluster.size",
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
                f"scaling.workers={scaling.workers} was requested, but cluster={kind.name} runs in a single process. "
                f"Use cluster=local, or run: torchrun --nproc-per-node={scaling.workers} -m launcher ...",
                key="scaling.workers",
            )
        where = found.where if ranks is None else f"{ranks} processes started by torchrun or srun"
        return Placement(kind.name, where, cpus, gpus, ranks or 1, device, scaling.cpus_per_worker, float(use_gpu))
    gpus_per_worker = _gpus_per_worker(job, use_gpu)
    workers = scaling.workers
    if workers == "auto":
        # On CPUs two workers suffice to try a run; more would only share the same cores.
        workers = max(1, int(gpus / gpus_per_worker) if use_gpu else min(2, int(cpus / scaling.cpus_per_worker)))
    capacity.check_feasible(scaling.min_workers or workers, scaling.cpus_per_worker, gpus_per_worker, (cpus, gpus))
    return Placement(kind.name, found.where, cpus, gpus, workers, device, scaling.cpus_per_worker, gpus_per_worker)


def place_on(job: Job, nodes: Sequence[capacity.Node], where: str, cluster: str) -> Placement:
    """Return the placement of the job's workers on the nodes of a cluster.

    Args:
        where: a description of the nodes.
        cluster: the name of the cluster kind.

    Raises:
        ResourceError: the requested workers can never fit on the nodes.
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
    """Return the plan of a job on the machines of its configuration.

    Args:
        ranks: the number of processes that torchrun or srun started, or None.
        marks: records the time of each phase.
        weights: the path or URI of the checkpoint with the initial weights, or None.

    Raises:
        RequestError: the request cannot be met; see `machines_of` and `engine.estimate`.
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
    """Return the plan of a job on these machines.

    Args:
        found: the engine's estimate of the job.

    Raises:
        ConfigError: the batch sizes or the length are inconsistent.
    """
    from launcher.engine.build import build_split, check_batch
    from launcher.engine.order import Order

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
        raise ConfigError(
            f"logging.profile={profile}: the run has only {steps} steps. Choose earlier steps.", key="logging.profile"
        )
    microbatch = max(stop - start for start, stop in share)
    parts = {
        "parameters": found.parameter_bytes,
        "gradients": found.gradient_bytes,
        "optimizer": found.optimizer_bytes,
    }
    kind = kind_of(job.strategy, job.trust)
    memory = kind.memory(job.strategy, machines.workers, parts)
    memory["activations"] = found.activation_bytes_per_sample * microbatch
    sent, communication = kind.traffic(job.strategy, trainer, found.parameter_bytes, found.gradient_bytes, len(share))
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
        gradient_bytes_per_step=sent,
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
