"""metrics.jsonl: one object per logged step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.runs.plain_files import open_file, replace_text


class JsonLines:
    """Appends one JSON object a logged step; the same step logged twice (loss, then validation) gives two objects.

    Args:
        path: the file.
        keep_until: on resume, the last step that is kept; what later, lost steps had written is removed.
    """

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        if keep_until is not None and path.exists():
            _truncate(path, keep_until)
        self._file = open_file(path, "a" if keep_until is not None else "w")

    def log(self, entry: Mapping[str, Any]) -> None:
        # NaN and infinity are not JSON; null says the same to every reader.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _truncate(path: Path, last_step: int) -> None:
    kept = []
    with open_file(path) as file:
        lines = file.read().splitlines()
    for line in lines:
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # half a line: the process was killed while it wrote
    replace_text(path, "".join(f"{line}\n" for line in kept))
