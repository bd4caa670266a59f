"""Asks for confirmation before SSH on a cluster's head is opened to all addresses: `cluster.ssh_from=0.0.0.0/0`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from launcher.clusters.azure.kind import ANYWHERE

_EVERY_ADDRESS = re.compile(r"(\+{0,2}cluster\.ssh_from)=['\"]?(0\.0\.0\.0/0|::/0)['\"]?")


def confirmed(words: Sequence[str]) -> list[str]:
    """Return the words of a command. A network of all addresses becomes `anywhere` if the user confirms it.

    Without a terminal or a confirmation the words are unchanged, and `check` of the cluster kind rejects them.
    """
    return [_confirmed(word) for word in words]


def _confirmed(word: str) -> str:
    found = _EVERY_ADDRESS.fullmatch(word)
    if found is None or not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return word
    print(f"{word} opens SSH on the cluster's head to every address. Open it? [y/N] ", end="", file=sys.stderr)
    sys.stderr.flush()
    answer = sys.stdin.readline().strip().lower()
    return f"{found[1]}={ANYWHERE}" if answer in ("y", "yes") else word
