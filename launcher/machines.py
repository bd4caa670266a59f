"""What `launch status` and `launch down` say and do: the Ray that `cluster.keep_minutes` keeps on this machine."""

from __future__ import annotations

import time
from typing import Any

from launcher.clusters import keep
from launcher.phrases import count, duration


def status() -> list[dict[str, Any]]:
    """Return the clusters of this user, one mapping each; secrets left out."""
    kept = keep.current()
    if kept is None:
        return []
    facts = {"name": "local", "kind": "local", "address": kept.address, "cpus": kept.cpus, "gpus": kept.gpus}
    state = "in use" if keep.in_use() else "idle"
    return [
        {
            **facts,
            "state": state,
            "seconds": round(time.time() - kept.since, 1),
            "keep_minutes": keep.idle_minutes(),
            "usd_per_hour": 0.0,
        }
    ]


def told(clusters: list[dict[str, Any]]) -> str:
    """Return `status` for people."""
    if not clusters:
        return "Nothing is kept: no Ray waits on this machine (cluster.keep_minutes keeps one)."
    return "\n".join(
        f"{one['name']}  {one['state']}  {count(one['cpus'], 'CPU')}, {count(one['gpus'], 'GPU')}  up for "
        f"{duration(one['seconds'])}, ends after {count(one['keep_minutes'], 'idle minute')}  "
        f"{one['usd_per_hour']:.2f} USD/h  `launch down` ends it now"
        for one in clusters
    )


def down() -> tuple[bool, str]:
    """End the kept Ray, with whatever runs on it. Returns whether nothing is left, and what to say."""
    kept = keep.current()
    if kept is None:
        return True, "Nothing is kept, so there is nothing to end."
    if not keep.end(kept):
        return False, f"Some processes with {kept.marker} in their environment could not be ended within 30 s."
    return True, "The Ray that was kept on this machine has ended."
