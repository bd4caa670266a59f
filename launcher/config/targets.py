"""The classes that a configuration may name under `_target_`, and their instantiation.

A configuration may come from a stranger, so a name in it must not be able to execute code. A name is checked three
times: by itself, before anything is imported (`check`); by the imported object, which must be a class of the kind that
its section expects, defined in an allowed module (`resolve`); and by its keys (`check_signature`).

Allowed are `launcher.engine`, `models`, `torch.nn`, `torch.optim`, the modules directly in the calling
directory, and the packages of `trust=[...]` on the command line. All functions take plain dictionaries and lists.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher.config.calling_directory import HOME, SHARED, add_calling_directory, calling_directories, shadows
from launcher.errors import ConfigError, TrustError, did_you_mean

__all__ = ["accepts", "add_calling_directory", "build", "check", "check_signature", "find_targets", "resolve"]

# `option`: an argument of a sampler or pruner.
KINDS = ("model", "data", "optimizer", "scheduler", "callback", "sampler", "pruner", "option")
# A callback has at least one of these methods.
HOOKS = ("on_start", "on_step", "on_evaluate", "on_log", "on_end")
# Of our own package only the engine has configurable classes; a `launcher.cli` in a configuration is an attack.
ALLOWED = ("launcher.engine", "models", "torch.nn", "torch.optim")
# Keys that the engine reads itself and that never reach the constructor.
RESERVED: dict[str, frozenset[str]] = {"optimizer": frozenset({"groups"}), "scheduler": frozenset({"interval"})}
# Arguments that only the engine can pass, and those that it passes to classes that accept them.
SUPPLIED: dict[str, frozenset[str]] = {"optimizer": frozenset({"params"}), "scheduler": frozenset({"optimizer"})}
OFFERED: dict[str, frozenset[str]] = {"scheduler": frozenset({"total_steps", "T_max"})}
# Optional arguments of an overlay such as `debug=pdb`, for any class: passed to classes that accept them.
IF_TAKEN = "_if_taken_"
HYDRA_KEYS = ("_partial_", "_args_", "_convert_", "_recursive_", "_mode_")


def find_targets(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key of the section, value of its `_target_`) for every section of plain data."""
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield at, tree["_target_"]
        for key, value in tree.items():
            yield from find_targets(value, f"{at}.{key}" if at else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from find_targets(value, f"{at}.{index}" if at else str(index))


def check(tree: Mapping[str, Any], trust: Sequence[str] = ()) -> None:
    """Check every `_target_` in `tree` by its name only; nothing is imported.

    Raises TrustError for a name outside the allow-list, ConfigError for Hydra's `_partial_` and its like.
    """
    for section, target in find_targets(tree):
        _check_name(target, section, trust)
    for key in _hydra_keys(tree):
        raise ConfigError(
            f"{key} is not understood: launch builds the class under `_target_` itself, from the keys beside it. "
            "Leave the key out.",
            key=key,
        )


def _hydra_keys(tree: Any, at: str = "") -> Iterator[str]:
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(tree, Mapping):
        items = iter(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = iter(enumerate(tree))
    for key, value in items:
        name = f"{at}.{key}" if at else str(key)
        if key in HYDRA_KEYS:
            yield name
        yield from _hydra_keys(value, name)


def _check_name(target: Any, section: str, trust: Sequence[str]) -> None:
    key = f"{section}._target_" if section else "_target_"
    if not isinstance(target, str):
        raise TrustError(f"{key} must be the dotted name of a class, but is {target!r}.")
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() and not part.startswith("__") for part in parts):
        raise TrustError(f'{key} is "{target}", which is not the dotted name of a class (package.module.Class).')
    if not _is_allowed(target, trust):
        if owner := shadows(parts[0]):
            raise TrustError(
                f'{key} names "{target}", but "{parts[0]}" is a module of {owner}, which one of the calling directory '
                "does not replace. Rename the file or folder in the calling directory."
            )
        raise TrustError(
            f'{key} names "{target}", which is outside of what a configuration may use: '
            f"{', '.join(ALLOWED)}, and the modules of the directory where launch is called{_calling_text()}. "
            f"If you know this code and trust it, add trust=[{parts[0]}] to the command line."
        )


def _calling_text() -> str:
    known = calling_directories()
    return f" ({known[0]})" if known else ""


def _is_allowed(name: str, trust: Sequence[str]) -> bool:
    """Return whether a dotted name (of a module or an object in it) is in the allow-list; imports nothing."""
    if any(name == prefix or name.startswith(f"{prefix}.") for prefix in (*ALLOWED, *trust)):
        return True
    return is_of_calling_directory(name)


def is_of_calling_directory(name: str) -> bool:
    """Return whether the top-level module of `name` is loaded from the calling directory itself.

    The actual location counts: a folder `torch` or a file `os.py` gives no trust to the installed module,
    and neither does a virtual environment inside the calling directory.
    """
    top, _, rest = name.partition(".")
    if top == __name__.partition(".")[0]:  # called in our own source tree, where launcher is not trusted either
        return False
    try:
        spec = importlib.util.find_spec(top)  # a top-level name: the import system only looks
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if spec.origin is not None and spec.has_location:
        file = Path(spec.origin)
        entry = file.parent if file.stem == "__init__" else file
        return _is_in_calling_directory(entry)
    # A folder without __init__.py may be spread over several places: ask whether this part of it is the caller's.
    child = rest.partition(".")[0]
    for location in spec.submodule_search_locations or []:
        if _is_in_calling_directory(Path(location)):
            return any((Path(location) / file).exists() for file in (child, f"{child}.py")) if child else True
    return False


def _is_in_calling_directory(entry: Path) -> bool:
    return Path(os.path.realpath(entry.parent)) in calling_directories()


def resolve(path: str, kind: str, trust: Sequence[str] = (), *, nested: bool = False) -> type:
    """Import the class that `path` names and check its actual type.

    kind: one of KINDS. nested: the section is inside another one, where any network is allowed.
    Raises TrustError for what is not allowed or not a class of the kind, ConfigError for what does not exist.
    """
    _check_name(path, "", trust)
    found = _import(path)
    name = getattr(found, "__qualname__", type(found).__name__)
    if not isinstance(found, type):
        raise TrustError(f'_target_ names "{path}", which is not a class. {_expected(kind, nested)}')
    module = getattr(found, "__module__", "")
    if not _is_allowed(f"{module}.{name}", trust) or not _is_from_known_place(module):
        raise TrustError(
            f'_target_ names "{path}", which is defined as {module}.{name}, outside of the allowed modules. '
            f"If you know this code and trust it, add trust=[{module.partition('.')[0]}] to the command line."
        )
    if not _is_of_kind(found, kind, nested):
        raise TrustError(f'_target_ names "{path}", a class of the wrong kind. {_expected(kind, nested)}')
    return found


def _import(path: str) -> Any:
    """Import the longest module that `path` begins with, then step through classes, never through other modules."""
    parts = path.split(".")
    module, count = _import_module(parts[0], path), 1
    while count < len(parts) and hasattr(module, "__path__"):
        name = ".".join(parts[: count + 1])
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            break
        module, count = _import_module(name, path), count + 1
    if count == len(parts):
        raise TrustError(f'_target_ names "{path}", which is a module and not a class.')
    found: Any = module
    for index, part in enumerate(parts[count:], start=count):
        if not hasattr(found, part):
            known = [word for word in dir(found) if isinstance(getattr(found, word, None), type)]
            owner = ".".join(parts[:index])
            raise ConfigError(
                f'_target_ names "{path}", but {owner} has no "{part}".{did_you_mean(part, known)}', key=path
            )
        found = getattr(found, part)
        # Every module that another one imports is its attribute (`models.vision.torch.load`): such detours are closed.
        if index < len(parts) - 1 and not isinstance(found, type):
            raise TrustError(f'_target_ names "{path}", but "{part}" in it is neither a module of its own nor a class.')
    return found


def _import_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise ConfigError(f'_target_ names "{path}", but there is no module "{name}".', key=path) from error
        raise ConfigError(
            f'_target_ names "{path}", whose module "{name}" needs the package "{error.name}", which is not installed.',
            key=path,
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise ConfigError(
            f'_target_ names "{path}", but importing "{name}" raised {type(error).__name__}: {error}{where}.', key=path
        ) from error


def _is_from_known_place(module: str) -> bool:
    """Return whether a module called `models...` is ours or the caller's, not an installed package."""
    top = module.partition(".")[0]
    if top not in SHARED:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return False
    places = [directory / name for directory in [*calling_directories(), HOME] for name in (top, f"{top}.py")]
    return any(Path(os.path.abspath(file)).is_relative_to(place) for place in places)


def _is_of_kind(found: type, kind: str, nested: bool) -> bool:
    from torch import nn, optim

    if kind in ("sampler", "pruner"):
        import optuna  # slow, and only sweeps need it

        return issubclass(found, optuna.samplers.BaseSampler if kind == "sampler" else optuna.pruners.BasePruner)
    if kind in ("data", "option"):
        # Any class of a data module; of our own engine and of torch only networks, which do nothing when built.
        own = found.__module__.partition(".")[0] in ("launcher", "torch")
        return issubclass(found, nn.Module) or not own
    if kind == "scheduler":  # one in another too: SequentialLR, ChainedScheduler
        return issubclass(found, optim.lr_scheduler.LRScheduler)
    if nested or kind == "model":
        return issubclass(found, nn.Module)
    if kind == "optimizer":
        return issubclass(found, optim.Optimizer)
    if kind == "callback":
        return any(callable(getattr(found, hook, None)) for hook in HOOKS)
    raise ValueError(f"unknown kind {kind!r}; known: {KINDS}")


def _expected(kind: str, nested: bool) -> str:
    if kind == "data":
        return "Here a class of a data module is expected."
    if kind == "option":
        return "Here a class of your own is expected."
    if kind in ("sampler", "pruner"):
        return f"Here a subclass of optuna.{kind}s.Base{kind.capitalize()} is expected."
    if (nested and kind != "scheduler") or kind == "model":
        return "Here a subclass of torch.nn.Module is expected."
    if kind == "optimizer":
        return "Here a subclass of torch.optim.Optimizer is expected."
    if kind == "callback":
        return f"Here a class with one of the methods {', '.join(HOOKS)} is expected."
    return "Here a subclass of torch.optim.lr_scheduler.LRScheduler is expected."


def check_signature(section: Mapping[str, Any], kind: str, trust: Sequence[str] = (), *, at: str = "") -> None:
    """Check the keys beside `_target_` against the class's signature, nested sections included.

    at: dotted key of the section for messages, by default `kind`. Raises ConfigError with the nearest name for a key
    that the class does not take or needs and is not given; TrustError as `resolve` does.
    """
    _check_section(section, kind, trust, at or kind)


def _check_section(section: Mapping[str, Any], kind: str, trust: Sequence[str], at: str, nested: bool = False) -> None:
    if "_target_" not in section:
        raise ConfigError(f"{at} names no class: it needs a `_target_`, for example {_example(kind)}.", key=at)
    _check_name(section["_target_"], at, trust)
    cls = resolve(section["_target_"], kind, trust, nested=nested)
    label = section["_target_"]
    reserved = frozenset() if nested else RESERVED.get(kind, frozenset())
    engines = not nested or kind == "scheduler"  # each schedule within another one is over the same optimizer
    supplied = SUPPLIED.get(kind, frozenset()) if engines else frozenset()
    offered = OFFERED.get(kind, frozenset()) if engines else frozenset()
    names, open_ended, required = _parameters(cls)
    optional = section.get(IF_TAKEN, {})
    if not isinstance(optional, Mapping):
        raise ConfigError(
            f"{at}.{IF_TAKEN} must be a mapping of arguments to values, but is {optional!r}.", key=f"{at}.{IF_TAKEN}"
        )
    keys = [str(key) for key in section if key not in ("_target_", IF_TAKEN) and key not in reserved]
    for key in keys:
        if key in supplied:
            raise ConfigError(
                f"{at}.{key} is given by the engine and cannot be configured. Leave it out.", key=f"{at}.{key}"
            )
        if key not in names and not open_ended:
            takes = ", ".join(name for name in names if name not in supplied) or "nothing"
            raise ConfigError(
                f"{at}.{key} is not taken by {label}.{did_you_mean(key, names)} It takes: {takes}.", key=f"{at}.{key}"
            )
    for name in required:
        if name not in keys and name not in supplied and name not in offered:
            raise ConfigError(f"{at}.{name} is not set, and {label} needs it. Add {at}.{name}=...", key=f"{at}.{name}")
    for key in [*keys, IF_TAKEN]:
        for child, value in _sections(section.get(key), f"{at}.{key}"):
            _check_section(value, kind, trust, child, nested=True)


def _example(kind: str) -> str:
    examples = {
        "model": "models.vision.ConvNet",
        "optimizer": "torch.optim.AdamW",
        "scheduler": "launcher.engine.optim.WarmupCosine",
        "callback": "launcher.engine.callbacks.Ema",
    }
    return examples.get(kind, "a data class of your own module")


def _sections(value: Any, at: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the outermost sections with a `_target_` inside `value`."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield at, value
            return
        for key, item in value.items():
            yield from _sections(item, f"{at}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _sections(item, f"{at}.{index}")


def _parameters(cls: Callable[..., Any]) -> tuple[list[str], bool, list[str]]:
    """Return (names that can be given by keyword, whether `**kwargs` takes any other, those without default)."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):  # written in C without a signature: nothing is known
        return [], True, []
    named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    open_ended = any(item.kind is item.VAR_KEYWORD for item in parameters)
    return [item.name for item in named], open_ended, [item.name for item in named if item.default is item.empty]


def accepts(section: Mapping[str, Any], kind: str, name: str, trust: Sequence[str] = ()) -> bool:
    """Whether the class of a section takes an argument called `name`."""
    names, open_ended, _ = _parameters(resolve(section["_target_"], kind, trust))
    return open_ended or name in names


def build(section: Mapping[str, Any], kind: str, trust: Sequence[str] = (), **extra: Any) -> Any:
    """Check a section in every respect, build what is nested in it, then the object itself.

    extra: arguments that the engine gives (`params`; `optimizer`, `total_steps`). `total_steps` goes only to a class
    that takes it, and a value in the section wins over it. Keys in RESERVED[kind] are left out.
    Exceptions of the constructors are passed on unchanged.
    """
    check({kind: section}, trust)
    check_signature(section, kind, trust)
    cls = resolve(section["_target_"], kind, trust)
    names, open_ended, _ = _parameters(cls)
    offered = OFFERED.get(kind, frozenset())
    given = {name: value for name, value in extra.items() if name not in offered or open_ended or name in names}
    left_out = RESERVED.get(kind, frozenset()) | {"_target_", IF_TAKEN}
    optional = {name: value for name, value in section.get(IF_TAKEN, {}).items() if name in names}
    section = {**section, **optional}
    shared = {name: given[name] for name in SUPPLIED.get(kind, ()) if name in given} if kind == "scheduler" else {}
    keys = {
        str(key): _build_nested(value, kind, trust, shared) for key, value in section.items() if key not in left_out
    }
    return cls(**{**given, **keys})


def _build_nested(value: Any, kind: str, trust: Sequence[str], shared: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        built = {key: _build_nested(item, kind, trust, shared) for key, item in value.items() if key != "_target_"}
        if "_target_" not in value:
            return built
        make: Callable[..., Any] = resolve(value["_target_"], kind, trust, nested=True)
        names, open_ended, _ = _parameters(make)
        taken = {name: one for name, one in shared.items() if open_ended or name in names}
        return make(**{**taken, **{str(key): item for key, item in built.items()}})
    if isinstance(value, (list, tuple)):
        return [_build_nested(item, kind, trust, shared) for item in value]
    return value
