"""The command line: its words, its verbs, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of `launch` and of `python -m launcher`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit status."""
    from launcher.cli import command

    return command.run(arguments)
