"""`launch diff A B`: compares the configuration, the words, the code, the versions and the results of two runs."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher import runs
from launcher.cli.line import Line
from launcher.cli.listing import strict_json
from launcher.cli.run_files import configuration_of, read, words_of
from launcher.cli.runs import run_root
from launcher.runs import RunDirectory
from launcher.terminal_text import printable

# Entries of result.json that describe the outcome of a run; `best`, `metrics`, `versions` and `git` are compared apart.
_OUTCOME = (
    *("status", "reason", "steps", "epochs", "samples", "workers", "restarts", "preemptions", "seconds"),
    *("samples_per_second", "cost_usd"),
)
_OWN_KEYS = ("run.name", "run.resume")  # differ between any two runs
_NOT_SET = "(not set)"

Difference = dict[str, Any]  # "a" and "b" with the values of the two runs; a side without the key is missing


def diff(line: Line) -> int:
    """Run `launch diff`: print the differences of two runs."""
    assert line.name is not None
    assert line.other is not None
    root = run_root(line)
    found = compare(runs.find(root, line.name), runs.find(root, line.other))
    if "json" in line.flags:
        print(json.dumps(strict_json(found), indent=2, default=str))
    else:
        sys.stdout.write(printable(text_of(found)))
    return 0


def compare(one: RunDirectory, other: RunDirectory) -> dict[str, Any]:
    """Return the differences of two runs; the first is `a`, the second `b`.

    Returns:
        `runs`: the names. `configuration`, `versions`, `results`: {key: {"a": value, "b": value}} for each key that
        differs. `words`: the words of the command line of one run only. `code`: the commits, and the lines of a unified
        diff between the uncommitted changes of the two runs.

    Raises:
        RunError: a file of a run cannot be read.
    """
    pair = one, other
    results = [run.result() for run in pair]
    words = [words_of(run) for run in pair]
    patches = [read(run, "code.patch").splitlines() for run in pair]
    patch = difflib.unified_diff(patches[0], patches[1], one.name, other.name, lineterm="")
    return {
        "runs": [one.name, other.name],
        "configuration": _differences([configuration_of(run) for run in pair], ignored=_OWN_KEYS),
        "words": {
            "a": [word for word in words[0] if word not in words[1]],
            "b": [word for word in words[1] if word not in words[0]],
        },
        "code": {
            **_differences([{"commit": (each.get("git") or {}).get("commit")} for each in results]),
            "patch": [*patch],
        },
        "versions": _differences([each.get("versions") or {} for each in results]),
        "results": _differences([_outcome(each) for each in results]),
    }


def text_of(found: Mapping[str, Any]) -> str:
    """Return the differences of `compare` as text."""
    one, other = found["runs"]
    lines = [f"a: {one}", f"b: {other}"]
    for title in ("configuration", "words", "code", "versions", "results"):
        section = list(_section(title, found[title]))
        lines += ["", title, *(f"  {line}" for line in section)] if section else []
    if len(lines) == 2:
        lines.append("No differences.")
    return "\n".join(lines) + "\n"


def _section(title: str, content: Mapping[str, Any]) -> Iterator[str]:
    if title == "words":
        yield from (f"- {word}" for word in content["a"])
        yield from (f"+ {word}" for word in content["b"])
        return
    values = {key: value for key, value in content.items() if key != "patch"}
    width = max(map(len, values), default=0)
    for key, value in values.items():
        yield f"{key:<{width}}  {_shown(value, 'a')} -> {_shown(value, 'b')}"
    yield from content.get("patch", ()) if title == "code" else ()


def _shown(value: Difference, side: str) -> str:
    if side not in value:
        return _NOT_SET
    return value[side] if isinstance(value[side], str) else json.dumps(value[side], ensure_ascii=False, default=str)


def _differences(pair: Sequence[Mapping[str, Any]], ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    found = {}
    for key in sorted({*pair[0], *pair[1]} - {*ignored}):
        sides = {side: values[key] for side, values in zip("ab", pair, strict=True) if key in values}
        if len(sides) == 1 or repr(sides["a"]) != repr(sides["b"]):  # by representation: NaN is equal to NaN
            found[key] = sides
    return found


def _outcome(result: Mapping[str, Any]) -> dict[str, Any]:
    best = result.get("best") or {}
    outcome = {key: result[key] for key in _OUTCOME if result.get(key) is not None}
    if best:
        outcome |= {f"best {best['tag']}": best["value"], "best step": best["step"]}
    return outcome | dict(result.get("metrics") or {})
