"""What a command prints: results to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.errors import LaunchError, UserCodeError
from launcher.terminal_text import printable


def say(text: str) -> None:
    """Print a line to standard error."""
    print(printable(text), file=sys.stderr)


def tell(error: LaunchError, verbose: bool) -> int:
    """Print an error, and return the exit status. Of several ranks only the first prints."""
    from launcher.jobs import ranks

    if not ranks.prints():
        return error.exit_status
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip("\n"))
    elif isinstance(error, UserCodeError) and error.traceback_text:
        say(error.traceback_text.rstrip("\n"))
    else:
        say(f"launch: {error}")
    return error.exit_status


@contextmanager
def results_alone() -> Iterator[Callable[[str], None]]:
    """Give a function that prints to standard output; all else that is written there goes to standard error.

    The file descriptor itself is redirected: what the user's C++ code, a child process or PyTorch writes does not pass
    through `sys.stdout`.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by a test, say: then there is nothing to mix
        yield print
        return
    sys.stdout.flush()
    kept = os.dup(descriptor)
    os.dup2(2, descriptor)

    def result(text: str) -> None:
        with os.fdopen(os.dup(kept), "w") as out:
            out.write(text + "\n")

    try:
        yield result
    finally:
        sys.stdout.flush()
        os.dup2(kept, descriptor)
        os.close(kept)
