"""The cost model of a training step: computation, communication, and how much of it overlaps.

    seconds = compute + exposed communication
    communication = 2 (n - 1) latency + 2 (n - 1) / n · bytes / bandwidth      (all-reduce around a ring of n workers)
    exposed = communication - min(communication, overlap · compute)

The ring is the bandwidth-optimal all-reduce (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69); gloo and NCCL
use it for large messages. Latency and bandwidth are measured between the workers (`engine.probe`) or read from a
catalogue. `overlap` is the share of a step's computation that can run during the reduction: at most the backward pass,
without the time after the last bucket. If workers share cores, computation is slower by the number of workers per core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OVERLAP = 0.5  # default share of a step's computation: about the backward pass without its last bucket
# Usable share of an Ethernet line rate with TCP, without headers and acknowledgements.
ETHERNET_EFFICIENCY = 0.94
ETHERNET_LATENCY = 50e-6  # seconds between two VMs: an assumption, not measured
# GPUs without peer access copy through host memory, which uses the slot twice. This is an assumption as well; GPUs that
# are connected by NVLink are faster.
PCIE_EFFICIENCY = 0.5
PCIE_LATENCY = 20e-6
# Bytes per second and direction of a slot with 16 lanes: 8, 16, 32 GT/s per lane, 128b/130b encoding (PCI Express base
# specifications 3.0, 4.0, 5.0).
PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}
# The default share of a GPU's peak FLOP rate that training achieves, for large matrix products without data stalls.
MFU = 0.4


@dataclass(frozen=True)
class Link:
    """The link between two workers.

    Attributes:
        latency: seconds per message.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float

    @classmethod
    def ethernet(cls, gbit: float, latency: float = ETHERNET_LATENCY) -> Link:
        """Return the link of an Ethernet line of `gbit` Gbit/s."""
        return cls(latency, gbit * 1e9 / 8 * ETHERNET_EFFICIENCY)

    @classmethod
    def pcie(cls, generation: int) -> Link:
        """Return the link between two GPUs of the same machine."""
        return cls(PCIE_LATENCY, PCIE[generation] * PCIE_EFFICIENCY)

    @classmethod
    def around(cls, hops: Sequence[tuple[int, Link]]) -> Link:
        """Return the effective link of a ring that consists of several kinds of links.

        Every link of a ring carries the same messages: the bandwidth is that of the slowest link, the latency is the
        mean.

        Args:
            hops: (number of links, link) for each kind.
        """
        used = [(times, link) for times, link in hops if times > 0]
        latency = sum(times * link.latency for times, link in used) / sum(times for times, _ in used)
        return cls(latency, min(link.bandwidth for _, link in used))

    @classmethod
    def fitted(cls, workers: int, nothing: float, less: tuple[float, float], more: tuple[float, float]) -> Link:
        """Fit a link to the measured durations of all-reduces.

        The bandwidth is the slope between the two messages, which excludes bursts that a switch forwards at once.

        Args:
            nothing: seconds of an all-reduce of a few bytes.
            less, more: (bytes, seconds) of two all-reduces.
        """
        nbytes, seconds = more[0] - less[0], max(more[1] - less[1], 1e-9)
        return cls(nothing / (2 * (workers - 1)), 2 * (workers - 1) / workers * nbytes / seconds)

    def all_reduce(self, workers: int, nbytes: float) -> float:
        """Return the seconds of an all-reduce over `workers` workers."""
        if workers < 2:
            return 0.0
        return 2 * (workers - 1) * self.latency + 2 * (workers - 1) / workers * nbytes / self.bandwidth


@dataclass(frozen=True)
class Step:
    """A predicted step: seconds of computation, of communication, and of communication that is not overlapped."""

    compute: float
    communication: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def share(self) -> float:
        """The share of the step that is spent waiting for communication."""
        return self.exposed / self.seconds if self.seconds else 0.0


def shared(compute: float, workers: int, cores: float) -> float:
    """Return the seconds of one of `workers` single-threaded workers on `cores` cores; `compute`: of a single "
    "worker."""
    return compute * max(1.0, workers / cores)


def predict(compute: float, nbytes: float, workers: int, link: Link, overlap: float = OVERLAP) -> Step:
    """Predict a data-parallel step.

    Args:
        compute: seconds of a worker's forward pass, backward pass and update.
        nbytes: bytes of the reduced gradients as they are sent (half of the float32 size if they are cast to 16 bits).
        overlap: see the module; 0 if the reduction starts after the backward pass.
    """
    communication = link.all_reduce(workers, nbytes)
    return Step(compute, communication, communication - min(communication, overlap * compute))


def predict_rare(compute: float, nbytes: float, workers: int, link: Link, every: int) -> Step:
    """Predict a step of local SGD or DiLoCo: parameters are averaged every `every` steps, without overlap."""
    communication = link.all_reduce(workers, nbytes) / every
    return Step(compute, communication, communication)


def predict_sharded(
    compute: float,
    gathered: float,
    reduced: float,
    workers: int,
    link: Link,
    *,
    messages: int,
    overlap: float = OVERLAP,
) -> Step:
    """Predict a step of FSDP: weights are all-gathered for each pass, gradients are reduce-scattered.

    Each of the three collectives passes once around the ring; an all-reduce passes twice. The overlap of `predict` is
    assumed; it was not fitted for FSDP.

    Args:
        gathered: bytes of weights as they are sent, over all microbatches of a step.
        reduced: bytes of gradients as they are sent, over all microbatches of a step.
        messages: number of times that a block is gathered for a forward pass in a step.
    """
    communication = 0.0
    if workers > 1:
        around = (2 * gathered + reduced) / link.bandwidth / workers
        communication = (workers - 1) * (3 * messages * link.latency + around)
    return Step(compute, communication, communication - min(communication, overlap * compute))


def fit_overlap(points: list[tuple[float, float, float]]) -> float:
    """Return the overlap in [0, 1] that fits the points (compute, communication, measured step) best.

    It minimises the sum of squared relative errors on a grid of 0.01.
    """

    def error(overlap: float) -> float:
        return sum(
            ((compute + communication - min(communication, overlap * compute)) / measured - 1) ** 2
            for compute, communication, measured in points
        )

    return min((step / 100 for step in range(101)), key=error)
