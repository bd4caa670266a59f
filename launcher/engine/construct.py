"""Builds the object of a configuration section; a value that its class rejects is a ConfigError."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config import targets
from launcher.engine.failures import is_foreign
from launcher.errors import ConfigError, LaunchError

_OF_TORCH = ("optimizer", "scheduler")  # their constructors only check arguments: an exception is a rejection


def construct(section: Mapping[str, Any], kind: str, trust: Sequence[str] = (), *, at: str = "", **extra: Any) -> Any:
    """Build the object of a section like `targets.build`.

    Args:
        at: dotted key of the section for messages; default: `kind`.

    Raises:
        ConfigError: the class rejects its arguments.
        Exception: any other exception that the class raises.
    """
    try:
        return targets.build(section, kind, trust, **extra)
    except LaunchError:
        raise
    except Exception as error:
        if not _is_rejection(error, kind):
            raise
        raise ConfigError(rejection(section, at or kind, error), key=at or kind) from error


def rejection(section: Mapping[str, Any], at: str, error: BaseException) -> str:
    """Return the message about a class that rejects the arguments of its section."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    plain = {key: value for key, value in section.items() if not isinstance(value, (Mapping, list)) and key[:1] != "_"}
    given = ", ".join(f"{key}={'null' if value is None else value}" for key, value in plain.items())
    return (
        f"{at}: {section['_target_']} rejects its arguments{f' ({given})' if given else ''}: {reason}{_place(error)}."
    )


def _place(error: BaseException) -> str:
    """Return the file and line of the innermost frame of the user's code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_foreign(frame.filename)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _is_rejection(error: Exception, kind: str) -> bool:
    """Whether the exception means that the constructor, or PyTorch called by it, rejects a value; else it is a bug."""
    if isinstance(error, (ValueError, AssertionError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if kind in _OF_TORCH and all(is_foreign(frame.filename) for frame in frames):
        return True
    return isinstance(error, (TypeError, RuntimeError)) and is_foreign(frames[-1].filename)
