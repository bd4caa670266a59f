"""The cost model, compared with cases that are computed by hand."""

from __future__ import annotations

import pytest

from launcher.engine.cost import Link, fit_overlap, predict, predict_rare, predict_sharded, shared

GIGABIT = Link(latency=1e-3, bandwidth=125e6)


def test_an_all_reduce_around_a_ring() -> None:
    """Two workers send half of the message twice; four send three quarters of it twice, in six messages."""
    assert GIGABIT.all_reduce(1, 1e9) == 0
    assert GIGABIT.all_reduce(2, 125e6) == pytest.approx(1.0 + 0.002)
    assert GIGABIT.all_reduce(4, 125e6) == pytest.approx(1.5 + 0.006)


def test_a_link_is_recovered_from_measured_durations() -> None:
    burst = 0.001  # a burst that a switch forwards at once shortens every message by the same time
    times = [GIGABIT.all_reduce(3, nbytes) - (burst if nbytes > 4 else 0) for nbytes in (0, 1e6, 4e6)]
    link = Link.fitted(3, times[0], (1e6, times[1]), (4e6, times[2]))

    assert (link.latency, link.bandwidth) == (pytest.approx(1e-3), pytest.approx(125e6))


def test_a_ring_has_the_lowest_bandwidth_and_the_mean_latency_of_its_links() -> None:
    card, line = Link.pcie(4), Link.ethernet(80)
    assert card.bandwidth == pytest.approx(31.5e9 / 2)
    ring = Link.around([(6, card), (2, line)])
    assert ring.bandwidth == line.bandwidth == pytest.approx(9.4e9)
    assert ring.latency == pytest.approx((6 * card.latency + 2 * line.latency) / 8)
    assert Link.around([(4, card), (0, line)]) == card


def test_communication_overlaps_at_most_with_the_overlap_share_of_computation() -> None:
    hidden = predict(compute=4.0, nbytes=125e6, workers=2, link=GIGABIT, overlap=0.5)
    assert (hidden.seconds, hidden.share) == (4.0, 0.0)
    partly = predict(compute=1.0, nbytes=125e6, workers=2, link=GIGABIT, overlap=0.5)
    assert partly.seconds == pytest.approx(1.0 + 1.002 - 0.5)
    assert partly.share == pytest.approx(0.502 / 1.502)
    rare = predict_rare(compute=1.0, nbytes=125e6, workers=2, link=GIGABIT, every=100)
    assert rare.seconds == pytest.approx(1.01002)


def test_sharding_passes_three_times_around_the_ring_and_an_all_reduce_twice() -> None:
    step = predict_sharded(1.0, gathered=125e6, reduced=125e6, workers=2, link=GIGABIT, messages=10, overlap=0.5)
    assert step.communication == pytest.approx(1.5 + 0.03)
    assert step.seconds == pytest.approx(1.0 + 1.53 - 0.5)
    assert predict_sharded(1.0, 1e9, 1e9, 1, GIGABIT, messages=1).seconds == 1.0


def test_workers_share_cores() -> None:
    assert [shared(1.0, workers, 2) for workers in (1, 2, 3, 4)] == [1.0, 1.0, 1.5, 2.0]


def test_the_overlap_is_recovered() -> None:
    points = [(compute, 1.0, compute + 1.0 - min(1.0, 0.3 * compute)) for compute in (0.5, 1.0, 2.0)]

    assert fit_overlap(points) == 0.3
