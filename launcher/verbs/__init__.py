"""What each verb does. Heavy imports wait within the functions until a verb needs them.

training, planning, trained, runs, clusters, kubernetes     the verbs, by kind
line       words and flags -> a verb          help       what Hydra shows
output     what goes to which output          listing    runs, logs, stop
sizes      the catalogue, printed             machines   the clusters of this user
"""

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
