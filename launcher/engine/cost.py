"""What a step takes: computing, latency, bandwidth, and how much of the communication computing hides.

    seconds = compute + exposed communication
    communication = 2 (n - 1) latency + 2 (n - 1) / n · bytes / bandwidth      (all-reduce around a ring of n workers)
    exposed = communication - min(communication, overlap · compute)

The ring is the bandwidth-optimal all-reduce (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69); gloo and NCCL
use it for large messages. Latency and bandwidth are measured between the workers (`engine.probe`) or read off a
catalogue; the overlap says which share of a step's computing the reduction can hide behind: at most the backward pass,
less what waits for the last bucket. Where workers share cores, computing takes as many times longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OVERLAP = 0.5  # of a step's computing, where nothing was fitted: about the backward pass without its last bucket
# What TCP over Ethernet leaves of a line's rate, headers and acknowledgements taken off.
ETHERNET_EFFICIENCY = 0.94
ETHERNET_LATENCY = 50e-6  # seconds from one VM to another: an assumption, measured nowhere here
# Cards that may not read each other's memory pass everything through the host's, which takes the slot twice. Likewise
# assumed: where NVLink joins two cards, it is quicker.
PCIE_EFFICIENCY = 0.5
PCIE_LATENCY = 20e-6
# Bytes per second each way of a slot with 16 lanes: 8, 16, 32 GT/s a lane, 128 bits of 130 (PCI Express base
# specifications 3.0, 4.0, 5.0).
PCIE = {3: 15.75e9, 4: 31.5e9, 5: 63.0e9}
# The share of a GPU's peak that training reaches where nothing was measured: large matrix products, well fed.
MFU = 0.4


@dataclass(frozen=True)
class Link:
    """Between two workers: seconds that a message takes at least, and bytes per second."""

    latency: float
    bandwidth: float

    @classmethod
    def ethernet(cls, gbit: float, latency: float = ETHERNET_LATENCY) -> Link:
        """A line of so many Gbit/s."""
        return cls(latency, gbit * 1e9 / 8 * ETHERNET_EFFICIENCY)

    @classmethod
    def pcie(cls, generation: int) -> Link:
        """From one card to another of the same machine."""
        return cls(PCIE_LATENCY, PCIE[generation] * PCIE_EFFICIENCY)

    @classmethod
    def around(cls, hops: Sequence[tuple[int, Link]]) -> Link:
        """Return what a ring through several kinds of links, (how many, which), amounts to.

        Every link of a ring carries the same messages: the ring is as wide as its narrowest link, and waits for all.
        """
        used = [(times, link) for times, link in hops if times > 0]
        latency = sum(times * link.latency for times, link in used) / sum(times for times, _ in used)
        return cls(latency, min(link.bandwidth for _, link in used))

    @classmethod
    def fitted(cls, workers: int, nothing: float, less: tuple[float, float], more: tuple[float, float]) -> Link:
        """Return the link on which all-reduces of next to nothing, and of two messages (bytes, seconds), take so long.

        The bandwidth is the slope between the two: what a switch lets through at once counts in neither.
        """
        nbytes, seconds = more[0] - less[0], max(more[1] - less[1], 1e-9)
        return cls(nothing / (2 * (workers - 1)), 2 * (workers - 1) / workers * nbytes / seconds)

    def all_reduce(self, workers: int, nbytes: float) -> float:
        """Seconds of an all-reduce over so many workers."""
        if workers < 2:
            return 0.0
        return 2 * (workers - 1) * self.latency + 2 * (workers - 1) / workers * nbytes / self.bandwidth


@dataclass(frozen=True)
class Step:
    """A predicted step: seconds of computing, of communication, and of communication that nothing hides."""

    compute: float
    communication: float
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def share(self) -> float:
        """The share of the step that waits for communication."""
        return self.exposed / self.seconds if self.seconds else 0.0


def shared(compute: float, workers: int, cores: float) -> float:
    """Return the computing of one of `workers` single-threaded workers on so many cores, from what one alone takes."""
    return compute * max(1.0, workers / cores)


def predict(compute: float, nbytes: float, workers: int, link: Link, overlap: float = OVERLAP) -> Step:
    """Predict a data-parallel step.

    Args:
        compute: seconds of a worker's forward and backward pass and its update.
        nbytes: of gradients that are reduced, as they travel (half of float32's when they are cast to 16 bits).
        overlap: see above; 0 where the reduction begins when the backward pass is done.
    """
    communication = link.all_reduce(workers, nbytes)
    return Step(compute, communication, communication - min(communication, overlap * compute))


def predict_rare(compute: float, nbytes: float, workers: int, link: Link, every: int) -> Step:
    """Predict a step of local SGD or DiLoCo: parameters are averaged every so many steps, and nothing hides it."""
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
    """Predict a step of FSDP: weights are gathered for either pass, gradients are scattered.

    Each of the three goes once around the ring, an all-reduce goes twice. As much computing is taken to hide it as with
    `predict`: nothing was fitted for it.

    Args:
        gathered: bytes of weights, as they travel, over the microbatches of a step.
        reduced: bytes of gradients, likewise.
        messages: how many times a block is gathered for a forward pass in a step.
    """
    communication = 0.0
    if workers > 1:
        around = (2 * gathered + reduced) / link.bandwidth / workers
        communication = (workers - 1) * (3 * messages * link.latency + around)
    return Step(compute, communication, communication - min(communication, overlap * compute))


def fit_overlap(points: list[tuple[float, float, float]]) -> float:
    """Return the overlap in 0 … 1 that explains points of (compute, communication, measured step) best.

    The sum of squared relative errors is smallest at it, on a grid of hundredths.
    """

    def error(overlap: float) -> float:
        return sum(
            ((compute + communication - min(communication, overlap * compute)) / measured - 1) ** 2
            for compute, communication, measured in points
        )

    return min((step / 100 for step in range(101)), key=error)
