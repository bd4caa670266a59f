"""What PyTorch imports that an uncompiled job never uses.

Every optimizer of PyTorch 2.13 imports `torch._dynamo` when it is built and at each step, and DDP looks into it once,
only to tell the compiler to keep out (`disable`, `graph_break`). With it come SymPy and a thousand modules: 0.7 s of
one core, in the driver and again in every worker. Until somebody compiles, those calls mean nothing.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

_NAME = "torch._dynamo"


def without_compiler() -> None:
    """Put off the import of `torch._dynamo` to the first use that needs it; nothing happens when it is there already.

    A stand-in takes its place, which answers the calls named above and becomes the real package at anything else: at
    `torch.compile`, at `import torch._dynamo.config`, at an attribute that it does not know.
    """
    if _NAME not in sys.modules:
        sys.modules[_NAME] = _StandIn()


def compiler_loaded() -> bool:
    """Whether the real `torch._dynamo` is there."""
    return not isinstance(sys.modules.get(_NAME), (_StandIn, type(None)))


class _StandIn(types.ModuleType):
    def __init__(self) -> None:
        super().__init__(_NAME)
        self._marked: list[Any] = []  # functions that remember our answer to `disable`
        self.utils = _Part(self, "utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # what the default means
        self.trace_rules = _Part(self, "trace_rules", clear_lru_cache=lambda: None)

    def graph_break(self, *_: Any, **__: Any) -> None:
        pass

    def disable(self, fn: Any = None, recursive: bool = True, *, wrapping: bool = True, **options: Any) -> Any:
        if wrapping or options:  # somebody else than PyTorch's own optimizers, who may keep what is returned
            return self._become_real().disable(fn, recursive, wrapping=wrapping, **options)
        self._marked.append(fn)

        @functools.wraps(fn)
        def call(*args: Any, **keys: Any) -> Any:
            return fn(*args, **keys)

        return call

    def _become_real(self) -> Any:
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            for fn in self._marked:  # they ask again, and get the real answer
                fn.__dict__.pop("__dynamo_disable", None)
        return importlib.import_module(_NAME)

    def __getattr__(self, name: str) -> Any:
        # Whoever looks through all modules (inspect, warnings) asks for names like __file__; only an import asks for
        # the path, to find a module within the package.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(self._become_real(), name)


class _Part(types.SimpleNamespace):
    def __init__(self, whole: _StandIn, name: str, **known: Callable[[], Any]) -> None:
        super().__init__(**known)
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_whole", "_name"):
            raise AttributeError(name)
        return getattr(getattr(self._whole._become_real(), self._name), name)
