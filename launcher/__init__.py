"""Distributed PyTorch training from a Hydra configuration.

>>> from launcher import launch
>>> result = launch("experiment=mnist", "trainer.epochs=1")
>>> result["metrics"]["val/accuracy"]
"""

from __future__ import annotations

import sys

# `python -m launcher` puts the current directory first on the path. Remove it before any other import, so that its
# modules do not shadow ours; `launcher.config.calling_directory` adds it again in the right place.
_as_module = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "launcher"
if _as_module and not sys.flags.safe_path and sys.path[0] != __path__[0].rpartition("/")[0]:
    del sys.path[0]

from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from launcher.api import launch, sweep

__all__ = ["launch", "sweep"]

# Hydra finds `hydra_plugins.launch_sweeper` here. `hydra_plugins` is a namespace package, without `__init__.py`.
sys.path.append(f"{__path__[0]}/plugins")


def __getattr__(name: str) -> Any:
    """Import the API on use, because it imports Hydra."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from launcher import api

    return getattr(api, name)
