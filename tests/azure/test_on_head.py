"""The watchdog on the head: what it asks for, what it lets go, and what it deletes when nobody else does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.clusters.azure import node_join, on_head
from launcher.clusters.azure.on_head import GRACE_SECONDS, HOLD_SECONDS, WISH_SECONDS, Seen, Watch

IDLE = 600.0


class Acts:
    def __init__(self, remove: bool = False, wish: int = 2) -> None:
        self.wish = wish
        self.did: list[tuple[str, int]] = []
        self.watch = Watch(IDLE, remove, lambda what, count: self.did.append((what, count)), now=0.0)

    def at(
        self,
        now: float,
        workers: int,
        busy: bool = False,
        wish: int | None = None,
        wished_at: float = 1.0,
        spent: bool = False,
    ) -> list[tuple[str, int]]:
        self.did.clear()
        self.watch.step(Seen(workers, busy), self.wish if wish is None else wish, wished_at, now, spent)
        return list(self.did)


def test_the_wish_is_taken_back_when_the_nodes_are_there() -> None:
    """A wish that stands keeps idle nodes for ever."""
    acts = Acts()
    assert acts.at(5, workers=0) == [("ask", 2)]
    assert acts.at(10, workers=1) == [("ask", 2)]
    assert acts.at(15, workers=2) == [("ask", 2)], "held: the run that asked for them begins"
    assert acts.at(15 + HOLD_SECONDS, workers=2) == [("release", 0)]
    assert acts.at(20 + HOLD_SECONDS, workers=2) == []
    assert acts.at(30 + HOLD_SECONDS, workers=1) == [], "one was evicted, and nobody waits for it"


def test_nodes_that_were_idle_for_long_are_held_for_a_new_run() -> None:
    """Ray would delete them between `up`, which finds them there, and the first task of the run."""
    acts = Acts()
    acts.at(15, workers=2)
    acts.at(15 + HOLD_SECONDS, workers=2)
    late = 15 + IDLE
    assert acts.at(late + 1, workers=2, wished_at=late) == [("ask", 2)]
    assert acts.at(late + 1 + IDLE + GRACE_SECONDS, workers=2, wished_at=late) == [("release", 0)]


def test_nothing_that_is_wished_holds_nothing() -> None:
    """cluster.min_nodes=0: no GPU VM comes before a job asks for one."""
    acts = Acts()
    assert acts.at(5, workers=0, wish=0) == []
    assert acts.at(10, workers=1, wish=0, busy=True) == []


def test_nodes_of_a_head_whose_ray_is_dead_go() -> None:
    """Nothing runs there, and only this watchdog is left to see it."""
    acts = Acts()
    assert acts.at(5, workers=0) == [("ask", 2)]
    acts.did.clear()
    for now, expected in ((10.0, []), (5 + IDLE + GRACE_SECONDS, []), (6 + IDLE + GRACE_SECONDS, [("workers", 1)])):
        acts.did.clear()
        acts.watch.step(Seen(1, busy=False, alive=False), 2, 1.0, now)
        assert acts.did == expected


def test_a_wish_that_comes_while_nodes_are_deleted_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise `up` would count machines that are just going, and a run begin on them."""
    monkeypatch.setattr(on_head, "WISH", tmp_path / "wish")
    monkeypatch.setattr(on_head, "LOCK", tmp_path / "wish.lock")
    monkeypatch.setattr(on_head, "SPENT", tmp_path / "spent")
    monkeypatch.setattr(on_head, "_seen", lambda: Seen(1, busy=False))
    on_head.WISH.write_text("0")
    os.utime(on_head.WISH, (1.0, 1.0))
    wish: list[subprocess.Popen[str]] = []

    def act(what: str, count: int) -> None:
        assert what == "workers"
        command = node_join.wish_of(2).replace(node_join.DIRECTORY, str(tmp_path))
        wish.append(subprocess.Popen(["sh", "-c", command], text=True))
        with pytest.raises(subprocess.TimeoutExpired):
            wish[0].wait(0.3)
        assert on_head.WISH.read_text() == "0"

    with on_head._alone():
        on_head.step(Watch(IDLE, False, act, now=0.0))
    assert wish[0].wait(10) == 0
    assert on_head.WISH.read_text() == "2\n"


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
    assert acts.at(15 + HOLD_SECONDS, workers=2) == [("release", 0)]
    assert acts.at(15 + IDLE + GRACE_SECONDS - 20, workers=2) == []
    assert acts.at(15 + IDLE + GRACE_SECONDS + 5, workers=2) == [("workers", 2)]


def test_work_is_never_interrupted() -> None:
    acts = Acts(remove=True, wish=0)
    for now in range(15, 10_000, 100):
        assert acts.at(now, workers=2, busy=True) == []
    assert acts.at(10_000 + IDLE - 200, workers=2) == []


def test_the_group_goes_when_it_was_asked_for() -> None:
    acts = Acts(remove=True, wish=0)
    acts.at(15, workers=2, busy=True)
    assert acts.at(15 + IDLE - 5, workers=0) == []
    assert acts.at(15 + IDLE + 5, workers=0) == [("group", 0)]
    assert Acts(remove=False).at(15 + IDLE + 5, workers=0, wish=0) == []


def test_nodes_go_at_once_when_a_budget_is_spent() -> None:
    acts = Acts(wish=0)
    acts.at(15, workers=2, busy=True)
    assert acts.at(20, workers=2, busy=True, spent=True) == [], "another run is at work"
    assert acts.at(25, workers=2, spent=True) == [("workers", 2)]
    assert acts.at(30, workers=0, spent=True) == []


def test_a_spent_budget_ends_a_wish() -> None:
    acts = Acts()
    assert acts.at(5, workers=1) == [("ask", 2)]
    assert acts.at(10, workers=1, spent=True) == [("release", 0), ("workers", 1)]


def test_what_the_autoscaler_complains_of_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason why nodes never come stands there alone; what ssh says on the way does not belong to it."""
    monkeypatch.setattr(on_head, "LOGS", tmp_path)
    monkeypatch.setattr(on_head, "ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("LAUNCH_FAILURES", str(tmp_path / "failures"))
    complaint = "ERROR azure: the policy 'no-gpu' forbids it"
    chatter = ["Warning: Permanently added '10.77.0.5' (ED25519)", "Shared connection to 10.77.0.5 closed.", ""]
    (tmp_path / "monitor.err").write_text("\n".join([*chatter, complaint, *chatter]))
    told = on_head.report()
    assert told["monitor_err"] == complaint
    assert told["nodes"] == []
    assert "127.0.0.1:9" in told["why_none"]
    assert complaint in node_join.complaint(told)
