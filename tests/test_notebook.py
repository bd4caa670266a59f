"""A run in a notebook: its progress, an interrupted cell, and the curves of its result, in a real kernel."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.command import Place
from tests.support.waiting import limit, wait_for
from tests.test_interrupts import has_steps

pytest.importorskip("ipykernel")
KernelManager = pytest.importorskip("jupyter_client.manager").KernelManager

WORDS = (
    *("experiment=toy", "run.name=a", "trainer.steps=100000", "trainer.log_every=1", "model.delay=0.01"),
    "logging.tensorboard=false",
)
RUN = f"from launcher import launch\nresult = launch(*{WORDS}, config_dir='own')"


def test_an_interrupted_cell_saves_a_checkpoint(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would be wrong: one output for each logged step, a KeyboardInterrupt, or a kernel that is lost."""
    monkeypatch.setenv("HOME", str(place.home))
    kernel = KernelManager()
    kernel.start_kernel(cwd=str(place.directory))
    client = kernel.client()
    client.start_channels()
    outputs: list[Any] = []

    def execute(code: str, at_work: Any = None) -> Any:
        outputs.clear()
        message = client.execute(code)
        if at_work is not None:
            at_work()
        reply = client.get_shell_msg(timeout=limit(120))
        while reply["parent_header"]["msg_id"] != message:
            reply = client.get_shell_msg(timeout=limit(120))
        while True:
            output = client.get_iopub_msg(timeout=limit(60))
            if output["parent_header"].get("msg_id") != message:
                continue
            if output["msg_type"] == "status" and output["content"]["execution_state"] == "idle":
                return reply["content"]
            outputs.append(output)

    def interrupt_at_work() -> None:
        wait_for(has_steps(place, 60), 120)
        kernel.interrupt_kernel()

    try:
        client.wait_for_ready(timeout=limit(60))
        assert execute(RUN, interrupt_at_work)["status"] == "ok", outputs
        kinds = [output["msg_type"] for output in outputs]
        assert kinds.count("display_data") == 1
        assert 1 <= kinds.count("update_display_data") < 60
        printed = "".join(output["content"]["text"] for output in outputs if output["msg_type"] == "stream")
        assert "step 1/" not in printed
        result = place.result("a")
        assert (result["status"], result["reason"]) == ("stopped", "signal")
        assert result["checkpoint"].endswith(f"step-{result['steps']:08}")
        assert execute("result.plot()")["status"] == "ok"
        [figure] = [output["content"]["data"] for output in outputs if output["msg_type"] == "execute_result"]
        assert "image/png" in figure
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
