"""Keeps the characters of values whose key has the type text: `run.name: 83e5123` is a name, not the number infinity.

YAML and Hydra's grammar parse such values as numbers, and the schema would convert the numbers back to text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

import yaml

from launcher.config.keys import leaves

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def text_keys() -> frozenset[str]:
    """Return the dotted keys of the schema that are text, or text or null."""
    return frozenset(key for key, kind in leaves().items() if kind is str or set(get_args(kind)) == {str, type(None)})


def quote(word: str, key: str, value: Any) -> str:
    """Return a word with quotes around its value if its key is text and Hydra has parsed a number or a boolean.

    Args:
        word: `key=value`.
        key: the key without prefixes such as `+`.
        value: the parsed value.
    """
    if key not in text_keys() or not isinstance(value, (bool, int, float)):
        return word
    name, _, text = word.partition("=")
    return f"{name}='{text.strip()}'"


def restore(content: Any, text: str, package: Sequence[str] = ()) -> None:
    """Replace numbers and booleans in the content of a YAML file by their characters where the key is text.

    Args:
        content: a mapping with the content of the file (a dict or a DictConfig), which is modified.
        text: the text of the file.
        package: the section of the configuration that the content belongs to.
    """
    found = list(_numbers(content, package))
    root = yaml.compose(text, Loader=_LOADER) if found else None
    for holder, path in found:
        node: Any = root
        for part in path:
            items = {key.value: item for key, item in node.value} if isinstance(node, yaml.MappingNode) else {}
            node = items.get(part)
        if isinstance(node, yaml.ScalarNode):
            holder[path[-1]] = node.value


def _numbers(content: Any, package: Sequence[str]) -> Iterator[tuple[Any, list[str]]]:
    """Yield (mapping, path of the key in the file) of each text key whose value is a number or a boolean."""
    for key in text_keys():
        path = key.split(".")
        if path[: len(package)] != list(package) or len(path) <= len(package):
            continue
        path = path[len(package) :]
        holder = content
        for part in path[:-1]:
            holder = _get(holder, part)
        if isinstance(_get(holder, path[-1]), (bool, int, float)):
            yield holder, path


def _get(holder: Any, key: str) -> Any:
    """Return the value of a key as it was written, or None."""
    if isinstance(holder, dict):
        return holder.get(key)
    node = holder._get_node(key) if hasattr(holder, "_get_node") and hasattr(holder, "keys") else None
    return node if hasattr(node, "keys") else getattr(node, "_value", lambda: None)()
