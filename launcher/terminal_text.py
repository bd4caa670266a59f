"""Text of runs, hosts and logs on its way to a terminal: it is shown, and drives nothing.

A terminal executes what follows an ESC, or a control character of C1: it moves the cursor, clears the screen, sets the
title, writes the clipboard. Marks that reverse the direction of text make a line read as another one.
"""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, colours: bool = False) -> str:
    r"""Return text with control characters written out (`\x1b`); line breaks and tabs stay, colours are left out.

    Args:
        colours: keep sequences that set colours and bold, for what is parsed into styles before it is printed.
    """
    if colours:
        return "".join(part if index % 2 else printable(part) for index, part in enumerate(_split(text)))
    return _CONTROL.sub(lambda found: _written(found[0]), _COLOURS.sub("", text))


def _split(text: str) -> list[str]:
    """Return what is between colours and the colours themselves, in turn."""
    return re.split(f"({_COLOURS.pattern})", text)


def _written(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
