"""The Python API, `from launcher import launch`, as a notebook uses it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher import launch
from launcher.errors import ConfigError, DataError, RunError, UserCodeError
from tests.support.command import Place
from tests.support.waiting import limit

TOY = ("experiment=toy", "logging.tensorboard=false")


def test_the_import_is_light() -> None:
    code = "import sys, launcher; launcher.launch; print({'torch', 'ray', 'hydra', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_launch_returns_the_content_of_result_json(here: Place) -> None:
    result = launch(*TOY, "run.name=a", config_dir="own")
    assert result == here.result("a")
    assert (result["status"], result["steps"]) == ("completed", 8)
    shown = here.capture.readouterr()
    assert shown.out == ""
    assert " 8/8 " in shown.err
    assert " 8 " in shown.err.splitlines()[-1]
    assert launch(*TOY, "run.name=a", "run.resume=true", config_dir="own") == result


def test_the_result_draws_the_curves(here: Place) -> None:
    result = launch(*TOY, "run.name=a", "trainer.log_every=2", config_dir="own", quiet=True)
    steps, values = result.curves()["train/loss"]
    assert steps == [2, 4, 6, 8]
    assert values[-1] == result["metrics"]["train/loss"]
    assert result.directory == here.runs / "a"
    figure = result.plot()
    [axes] = figure.axes
    assert [line.get_label() for line in axes.lines] == ["train/loss", "val/loss"]
    assert list(axes.lines[0].get_ydata()) == values
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="val/f1"):
        result.plot("val/f1")


def test_two_quiet_runs_in_one_process(here: Place) -> None:
    losses = [launch(*TOY, config_dir=Path("own"), quiet=True)["metrics"]["train/loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert here.capture.readouterr() == ("", "")


def test_errors_are_raised(here: Place) -> None:
    with pytest.raises(ConfigError, match="foo"):
        launch(*TOY, "foo=1", config_dir="own", quiet=True)
    with pytest.raises(DataError, match="row 0"):
        launch(*TOY, "data.bad=0", config_dir="own", quiet=True)
    with pytest.raises(UserCodeError) as caught:
        launch(*TOY, "model.failure=raise", "model.at=3", "run.name=a", config_dir="own", quiet=True)
    assert "in stumble" in caught.value.traceback_text
    assert here.result("a")["status"] == "failed"
    with pytest.raises(RunError, match=r'"a".*run\.resume=true'):
        launch(*TOY, "run.name=a", config_dir="own", quiet=True)


def test_launch_outside_of_the_main_thread(here: Place) -> None:
    """Python allows signal handlers only in the main thread."""
    results: list[dict] = []
    thread = threading.Thread(target=lambda: results.append(launch(*TOY, config_dir="own", quiet=True)))
    thread.start()
    thread.join(240)
    assert results[0]["status"] == "completed"


NOTEBOOK = """
import json, ray
from launcher import launch
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
words = ["experiment=toy", "cluster=local", "logging.tensorboard=false"]
result = launch(*words, config_dir="own")
seven = ray.get(ray.remote(num_cpus=1)(lambda: 7).remote(), timeout=240)  # the CPUs of the job are free again
print(json.dumps([result["status"], result["workers"], ray.is_initialized(), seven]))
"""


def test_an_initialized_ray_is_used_and_left_running(place: Place) -> None:
    """One worker uses the one CPU of that Ray, independent of the CPUs of this machine."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], cwd=place.directory, capture_output=True, text=True, timeout=limit(90)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["completed", 1, True, 7]
    assert "1 CPU " in done.stderr
