"""What each verb does, one file a kind. Heavy imports wait within the functions until a verb needs them."""

from __future__ import annotations

from collections.abc import Callable

from launcher.verbs import clusters, planning, runs, trained, training
from launcher.verbs.line import Line

RUN: dict[str, Callable[[Line], int]] = {
    "train": training.train,
    "plan": planning.plan,
    "evaluate": trained.evaluate,
    "predict": trained.predict,
    "export": trained.export,
    "runs": runs.runs,
    "logs": runs.logs,
    "stop": runs.stop,
    "board": runs.board,
    "sizes": clusters.sizes,
    "up": clusters.up,
    "status": clusters.status,
    "down": clusters.down,
}
