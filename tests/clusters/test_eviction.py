"""The agent that hears of evictions: what it makes of Azure's answers, good and bad, and what it tells when."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.clusters.eviction import Agent, Metadata, Notice, Poll, notice_in
from tests.support.scheduled_events import ScheduledEvents, body, event, reset
from tests.support.waiting import wait_for

NOW = 1_795_000_000.0


@pytest.mark.parametrize(
    ("events", "deadline"),
    [
        ([], None),
        ([event(not_before=NOW + 30)], NOW + 30),
        ([event(not_before=NOW + 30, Resources=["GPU-1", "gpu-2"])], NOW + 30),
        ([event("gpu-2", not_before=NOW + 30)], None),
        ([event("gpu-11", not_before=NOW + 30)], None),
        ([event(not_before="")], NOW),
        ([event(not_before="soon")], NOW),
        ([event(NotBefore=None)], NOW),
        ([event(kind="Freeze", not_before=NOW + 30)], None),
        ([event(kind="Reboot", not_before=NOW + 900)], NOW + 900),
        ([event(kind="Redeploy", not_before=NOW + 600), event(not_before=NOW + 30)], NOW + 30),
        ([event(kind="Terminate", not_before=NOW + 300)], NOW + 300),
        ([event(EventStatus="Completed", not_before=NOW + 30)], None),
        (["nonsense", event(Resources=None, not_before=NOW + 30)], None),
    ],
)
def test_notice_in_a_document(events: list[Any], deadline: float | None) -> None:
    notice = notice_in({"DocumentIncarnation": 7, "Events": events}, "gpu-1", NOW)
    assert (notice and notice.deadline) == deadline


@pytest.mark.parametrize("document", [{}, {"Events": None}, {"error": "try later"}, [], "text"])
def test_what_is_no_document_takes_no_notice_back(document: Any) -> None:
    with pytest.raises(ValueError, match="no list of events"):
        notice_in(document, "gpu-1", NOW)


class Told:
    """A node that writes down what it is told; the first `failures` words do not arrive."""

    def __init__(self, failures: int = 0) -> None:
        self.words: list[tuple[str, float | None]] = []
        self._failures = failures

    def _tell(self, word: str, deadline: float | None) -> None:
        if self._failures:
            self._failures -= 1
            raise OSError("the head does not answer")
        self.words.append((word, deadline))

    def publish(self, notice: Notice) -> None:
        self._tell("publish", notice.deadline)

    def withdraw(self) -> None:
        self._tell("withdraw", None)

    def drain(self, notice: Notice) -> None:
        self._tell("drain", notice.deadline)


def _notice(deadline: float, identity: str = "E1") -> Notice:
    return Notice("gpu-1", "Preempt", deadline, identity)


# (second, what Azure says then: a deadline, None for no event, ... for nothing new) -> what the node is told until then
@pytest.mark.parametrize(
    ("story", "told"),
    [
        pytest.param([(0, 30), (1, ...), (24, ...)], [("publish", 30)], id="drained late"),
        pytest.param([(0, 30), (25, ...), (31, ...)], [("publish", 30), ("drain", 30)], id="drained once"),
        pytest.param([(0, 30), (10, None), (40, ...)], [("publish", 30), ("withdraw", None)], id="withdrawn"),
        pytest.param([(0, 3)], [("publish", 3), ("drain", 3)], id="short"),
        pytest.param([(0, 30), (30, 30), (31, 31)], [("publish", 30), ("drain", 30)], id="begins: deadline stays"),
        pytest.param([(0, 30), (5, 20), (6, ...)], [("publish", 30), ("publish", 20)], id="sooner"),
    ],
)
def test_what_the_node_is_told(story: list, told: list) -> None:
    node = Told()
    agent = Agent(node, drain_seconds=5, log=lambda text: None)
    for second, says in story:
        if says is not ...:
            agent.seen(None if says is None else _notice(says))
        agent.step(second)
    assert node.words == told


def test_what_did_not_arrive_is_told_again_and_logged_once() -> None:
    node = Told(failures=3)
    lines: list[str] = []
    agent = Agent(node, drain_seconds=5, log=lines.append)
    agent.seen(_notice(30))
    for second in range(5):
        agent.step(second)
    assert node.words == [("publish", 30)]
    assert sum("could not be told" in line for line in lines) == 1


def test_a_signal_counts_like_a_notice_and_the_earlier_one_counts() -> None:
    node = Told()
    agent = Agent(node, drain_seconds=5, log=lambda text: None)
    agent.seen(_notice(30))
    agent.step(0)
    agent.terminated("gpu-1", 1, seconds=15)
    agent.step(1)
    agent.seen(None)  # Azure takes its own back; the machine goes down nevertheless
    agent.step(2)
    assert node.words == [("publish", 30), ("publish", 16)]


@pytest.fixture
def service() -> Iterator[ScheduledEvents]:
    with ScheduledEvents() as served:
        yield served


def test_bad_answers_change_nothing_and_the_polling_goes_on(service: ScheduledEvents) -> None:
    """Each of these was seen as a withdrawal, or ended the thread, in some agent or other."""
    taken: list[Notice | None] = []
    lines: list[str] = []
    service.set(event(not_before=NOW + 30))
    poll = Poll(Metadata(service.url), None, 0.05, taken.append, lines.append)
    poll.start()
    wait_for(lambda: taken)
    asked = service.asked
    service.script(
        body("", 503), reset, body("not JSON"), body("{}"), body(b"\xff\xfe"), body("[]"), body("Gone", 410), body("1")
    )
    wait_for(lambda: service.asked >= asked + 10)
    service.set(event(not_before=NOW + 30))  # another incarnation of the same
    asked = service.asked
    wait_for(lambda: service.asked >= asked + 2)
    assert set(taken) == {_notice(NOW + 30)}
    service.set(event("gpu-2", not_before=NOW + 30))
    wait_for(lambda: taken[-1] is None)
    poll.end()
    assert poll.vm == "gpu-1"
    assert len(lines) == 2, f"silence and its end are told once: {lines}"


def test_a_slow_first_answer_is_waited_for(service: ScheduledEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure takes up to two minutes; the short patience of later questions would never let the service begin."""
    monkeypatch.setattr("launcher.clusters.eviction.ANSWER_SECONDS", 0.3)
    service.script(body('{"DocumentIncarnation": 1, "Events": []}', seconds=1.0))
    asked: list[int] = []
    poll = Poll(Metadata(service.url), "gpu-1", 0.05, lambda notice: asked.append(service.asked), lambda text: None)
    poll.start()
    wait_for(lambda: asked)
    assert asked[0] == 1
    poll.end()


@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGTERM, "SIGTERM: the node is taken to end"), (signal.SIGINT, "")]
)
def test_the_program_hears_signals_while_an_answer_is_slow(service: ScheduledEvents, number: int, says: str) -> None:
    """The cluster does not answer either: the program ends in its time all the same."""
    service.script(body("{}", seconds=8.0))
    words = ["--address", "127.0.0.1:1", "--vm", "gpu-1", "--metadata", service.url, "--term-seconds", "0.5"]
    program = subprocess.Popen(
        [sys.executable, "-m", "launcher.clusters.eviction", *words], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: service.asked)
    program.send_signal(number)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 0
    assert says in said
    assert "Traceback" not in said


def test_it_imports_no_ray_before_there_is_something_to_say() -> None:
    code = "import sys, launcher.clusters.eviction; print({'ray', 'torch', 'hydra', 'yaml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
