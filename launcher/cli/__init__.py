"""The command line: verbs, flags, overrides, and what they print."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from launcher.cli import streams


def main() -> NoReturn:
    """Entry point of `launch` and of `python -m launcher`."""
    streams.open_standard()
    if sys.argv[1:2] == ["--complete"]:  # at each Tab: imports as little as possible
        from launcher.cli.completion import complete

        print("\n".join(complete(" ".join(sys.argv[2:]))))
        sys.exit(0)
    sys.exit(streams.close_standard(run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status."""
    from launcher.config.calling_directory import guard

    with suppress(FileNotFoundError):  # the current directory was deleted
        guard(os.curdir)
    from launcher.cli import command  # after `guard`: its imports must not find modules of the current directory

    return command.run(arguments)
