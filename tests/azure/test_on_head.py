"""The watchdog on the head: what it asks for, what it lets go, and what it deletes when nobody else does."""

from __future__ import annotations

from launcher.clusters.azure.on_head import GRACE_SECONDS, WISH_SECONDS, Seen, Watch

IDLE = 600.0


class Acts:
    def __init__(self, remove: bool = False) -> None:
        self.did: list[tuple[str, int]] = []
        self.watch = Watch(IDLE, remove, lambda what, count: self.did.append((what, count)), now=0.0)

    def at(
        self,
        now: float,
        workers: int,
        busy: bool = False,
        wish: int = 2,
        wished_at: float = 1.0,
        spent: bool = False,
    ) -> list[tuple[str, int]]:
        self.did.clear()
        self.watch.step(Seen(workers, busy), wish, wished_at, now, spent)
        return list(self.did)


def test_the_wish_is_taken_back_when_the_nodes_are_there() -> None:
    """A wish that stands keeps idle nodes for ever."""
    acts = Acts()
    assert acts.at(5, workers=0) == [("ask", 2)]
    assert acts.at(10, workers=1) == [("ask", 2)]
    assert acts.at(15, workers=2) == [("release", 0)]
    assert acts.at(20, workers=2) == []
    assert acts.at(30, workers=1) == [], "one was evicted, and nobody waits for it"


def test_the_wish_has_its_time() -> None:
    """Where Azure has no capacity the watchdog does not ask for ever, and a new wish begins anew."""
    acts = Acts()
    acts.at(5, workers=0)
    assert acts.at(WISH_SECONDS + 1, workers=0) == [("release", 0)]
    assert acts.at(WISH_SECONDS + 10, workers=0) == []
    assert acts.at(WISH_SECONDS + 20, workers=0, wished_at=WISH_SECONDS + 15) == [("ask", 2)]


def test_idle_nodes_that_ray_leaves_standing_are_deleted() -> None:
    acts = Acts()
    acts.at(15, workers=2)
    assert acts.at(15 + IDLE + GRACE_SECONDS - 20, workers=2) == []
    assert acts.at(15 + IDLE + GRACE_SECONDS + 5, workers=2) == [("workers", 2)]


def test_work_is_never_interrupted() -> None:
    acts = Acts(remove=True)
    for now in range(15, 10_000, 100):
        assert acts.at(now, workers=2, busy=True) == []
    assert acts.at(10_000 + IDLE - 200, workers=2) == []


def test_the_group_goes_when_it_was_asked_for() -> None:
    acts = Acts(remove=True)
    acts.at(15, workers=2, busy=True)
    assert acts.at(15 + IDLE - 5, workers=0) == []
    assert acts.at(15 + IDLE + 5, workers=0) == [("group", 0)]
    assert Acts(remove=False).at(15 + IDLE + 5, workers=0, wish=0) == []


def test_nodes_go_at_once_when_a_budget_is_spent() -> None:
    acts = Acts()
    acts.at(15, workers=2, busy=True)
    assert acts.at(20, workers=2, busy=True, spent=True) == [], "another run is at work"
    assert acts.at(25, workers=2, spent=True) == [("workers", 2)]
    assert acts.at(30, workers=0, spent=True) == []


def test_a_spent_budget_ends_a_wish() -> None:
    acts = Acts()
    assert acts.at(5, workers=1) == [("ask", 2)]
    assert acts.at(10, workers=1, spent=True) == [("release", 0), ("workers", 1)]
