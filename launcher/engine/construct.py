"""Building what a section names, with the class's refusal of a value as an error of the configuration."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config import targets
from launcher.engine.failures import is_foreign
from launcher.errors import ConfigError, LaunchError

_OF_TORCH = ("optimizer", "scheduler")  # kinds whose constructors compute nothing: what they raise is a refusal


def construct(section: Mapping[str, Any], kind: str, trust: Sequence[str] = (), *, at: str = "", **extra: Any) -> Any:
    """Build the object of a section as `targets.build` does.

    at: dotted key of the section for messages, by default `kind`.

    Raises:
        ConfigError: the class refuses its arguments.
        Exception: what a defect of the class itself raises.
    """
    try:
        return targets.build(section, kind, trust, **extra)
    except LaunchError:
        raise
    except Exception as error:
        if not _is_refusal(error, kind):
            raise
        raise ConfigError(refusal(section, at or kind, error)) from error


def refusal(section: Mapping[str, Any], at: str, error: BaseException) -> str:
    """Return one paragraph about a class that does not accept its section."""
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    plain = {key: value for key, value in section.items() if not isinstance(value, (Mapping, list)) and key[:1] != "_"}
    given = ", ".join(f"{key}={'null' if value is None else value}" for key, value in plain.items())
    return f"{at}: {section['_target_']} refuses its arguments{f' ({given})' if given else ''}: {said}{_place(error)}."


def _place(error: BaseException) -> str:
    """Return the file and line of the user's innermost frame."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_foreign(frame.filename)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _is_refusal(error: Exception, kind: str) -> bool:
    """Whether a constructor refuses a value, or hands one to PyTorch that PyTorch refuses; all else is a defect."""
    if isinstance(error, (ValueError, AssertionError)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if kind in _OF_TORCH and all(is_foreign(frame.filename) for frame in frames):
        return True
    return isinstance(error, (TypeError, RuntimeError)) and is_foreign(frames[-1].filename)
