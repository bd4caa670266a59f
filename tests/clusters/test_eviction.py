"""The eviction agent: how it interprets Azure's responses, valid and invalid, and when it notifies the cluster."""

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
def test_the_notice_in_a_document(events: list[Any], deadline: float | None) -> None:
    notice = notice_in({"DocumentIncarnation": 7, "Events": events}, "gpu-1", NOW)
    assert (notice and notice.deadline) == deadline


@pytest.mark.parametrize("document", [{}, {"Events": None}, {"error": "try later"}, [], "text"])
def test_an_invalid_document_withdraws_no_notice(document: Any) -> None:
    with pytest.raises(ValueError, match="no list of events"):
        notice_in(document, "gpu-1", NOW)


class RecordingNode:
    """A node that records the calls of the agent. The first `failures` calls raise an error."""

    def __init__(self, failures: int = 0) -> None:
        self.calls: list[tuple[str, float | None]] = []
        self._failures = failures

    def _call(self, name: str, deadline: float | None) -> None:
        if self._failures:
            self._failures -= 1
            raise OSError("the head does not answer")
        self.calls.append((name, deadline))

    def publish(self, notice: Notice) -> None:
        self._call("publish", notice.deadline)

    def withdraw(self) -> None:
        self._call("withdraw", None)

    def drain(self, notice: Notice) -> None:
        self._call("drain", notice.deadline)


def _notice(deadline: float, identity: str = "E1") -> Notice:
    return Notice("gpu-1", "Preempt", deadline, identity)


# (second, Azure's document: a deadline, None without an event, ... without a new document) -> calls of the agent
@pytest.mark.parametrize(
    ("story", "calls"),
    [
        pytest.param([(0, 30), (1, ...), (24, ...)], [("publish", 30)], id="drained late"),
        pytest.param([(0, 30), (25, ...), (31, ...)], [("publish", 30), ("drain", 30)], id="drained once"),
        pytest.param([(0, 30), (10, None), (40, ...)], [("publish", 30), ("withdraw", None)], id="withdrawn"),
        pytest.param([(0, 3)], [("publish", 3), ("drain", 3)], id="short"),
        pytest.param([(0, 30), (30, 30), (31, 31)], [("publish", 30), ("drain", 30)], id="started: deadline unchanged"),
        pytest.param([(0, 30), (5, 20), (6, ...)], [("publish", 30), ("publish", 20)], id="sooner"),
    ],
)
def test_the_calls_on_the_node(story: list, calls: list) -> None:
    node = RecordingNode()
    agent = Agent(node, drain_seconds=5, log=lambda text: None)
    for second, deadline in story:
        if deadline is not ...:
            agent.seen(None if deadline is None else _notice(deadline))
        agent.step(second)
    assert node.calls == calls


def test_a_failed_call_is_retried_and_logged_once() -> None:
    node = RecordingNode(failures=3)
    lines: list[str] = []
    agent = Agent(node, drain_seconds=5, log=lines.append)
    agent.seen(_notice(30))
    for second in range(5):
        agent.step(second)
    assert node.calls == [("publish", 30)]
    assert sum("OSError" in line for line in lines) == 1


def test_a_signal_is_a_notice_and_the_earliest_deadline_applies() -> None:
    node = RecordingNode()
    agent = Agent(node, drain_seconds=5, log=lambda text: None)
    agent.seen(_notice(30))
    agent.step(0)
    agent.terminated("gpu-1", 1, seconds=15)
    agent.step(1)
    agent.seen(None)  # Azure cancels the event, but the machine is shutting down
    agent.step(2)
    assert node.calls == [("publish", 30), ("publish", 16)]


@pytest.fixture
def service() -> Iterator[ScheduledEvents]:
    with ScheduledEvents() as served:
        yield served


def test_invalid_responses_change_nothing_and_polling_continues(service: ScheduledEvents) -> None:
    """Each of these responses has withdrawn a notice, or stopped the thread, in some agent."""
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
    service.set(event(not_before=NOW + 30))  # a new document with the same event
    asked = service.asked
    wait_for(lambda: service.asked >= asked + 2)
    assert set(taken) == {_notice(NOW + 30)}
    service.set(event("gpu-2", not_before=NOW + 30))
    wait_for(lambda: taken[-1] is None)
    poll.end()
    assert poll.vm == "gpu-1"
    assert len(lines) == 2, f"the loss of the service and its return are each logged once: {lines}"


def test_a_slow_first_response_is_awaited(service: ScheduledEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure takes up to two minutes to activate the service. The time limit of later requests is shorter."""
    monkeypatch.setattr("launcher.clusters.eviction.ANSWER_SECONDS", 0.3)
    service.script(body('{"DocumentIncarnation": 1, "Events": []}', seconds=1.0))
    asked: list[int] = []
    poll = Poll(Metadata(service.url), "gpu-1", 0.05, lambda notice: asked.append(service.asked), lambda text: None)
    poll.start()
    wait_for(lambda: asked)
    assert asked[0] == 1
    poll.end()


@pytest.mark.parametrize(("number", "logged"), [(signal.SIGTERM, "SIGTERM received"), (signal.SIGINT, "")])
def test_signals_are_handled_during_a_slow_response(service: ScheduledEvents, number: int, logged: str) -> None:
    """The cluster does not answer either, and the program exits in time nevertheless."""
    service.script(body("{}", seconds=8.0))
    words = ["--address", "127.0.0.1:1", "--vm", "gpu-1", "--metadata", service.url, "--term-seconds", "0.5"]
    program = subprocess.Popen(
        [sys.executable, "-m", "launcher.clusters.eviction", *words], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: service.asked)
    program.send_signal(number)
    _, output = program.communicate(timeout=240)
    assert program.returncode == 0
    assert logged in output
    assert "Traceback" not in output


def test_the_module_imports_no_heavy_library() -> None:
    code = "import sys, launcher.clusters.eviction; print({'ray', 'torch', 'hydra', 'yaml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
