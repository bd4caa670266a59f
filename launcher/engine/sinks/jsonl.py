"""The sink that writes metrics.jsonl: one JSON object per logged step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from launcher.config import Job
from launcher.engine.sinks.base import Position, Sink, SinkContext, register
from launcher.runs.plain_files import open_file, replace_text


@register("jsonl")
class JsonLines(Sink):
    """Appends one JSON object per logged step. On resume, the objects of later steps are removed."""

    @classmethod
    def is_on(cls, job: Job) -> bool:
        return True

    def open(self, context: SinkContext) -> None:
        path, last_step = context.directory.metrics, context.resumed_at
        if last_step is not None and path.exists():
            _truncate(path, last_step)
        self._file = open_file(path, "a" if last_step is not None else "w")

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        # JSON has no NaN and infinity; readers treat null as missing.
        entry = {**asdict(at), **values}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self, ended_well: bool) -> None:
        self._file.close()


def _truncate(path: Path, last_step: int) -> None:
    lines = []
    with open_file(path) as file:
        content = file.read().splitlines()
    for line in content:
        try:
            if json.loads(line)["step"] <= last_step:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a truncated line: the process was killed during the write
    replace_text(path, "".join(f"{line}\n" for line in lines))
