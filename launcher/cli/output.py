"""What a command prints: results go to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.cli.streams import QuietStream
from launcher.errors import LaunchError, UserCodeError
from launcher.jobs import ranks
from launcher.terminal_text import printable


def say(text: str) -> None:
    """Print a line to standard error, if it can be written."""
    print(printable(text), file=QuietStream(sys.stderr), flush=True)


def report(error: LaunchError, verbose: bool) -> int:
    """Print an error and return its exit status. With several ranks only the first one prints.

    Args:
        verbose: print the traceback as well.
    """
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
def results_only(is_required: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that prints to standard output, and redirect all other output there to standard error.

    The file descriptor itself is redirected, because the user's C++ code, child processes and PyTorch do not write
    through `sys.stdout`.

    Args:
        is_required: raise OSError if a result cannot be written. Otherwise it is printed to standard error.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):  # replaced, for example by a test: nothing to separate
        yield print
        return
    sys.stdout.flush()
    original = os.dup(descriptor)
    os.dup2(2, descriptor)

    def result(text: str) -> None:
        try:
            with os.fdopen(os.dup(original), "w") as out:
                out.write(text + "\n")
        except OSError as error:
            if is_required:
                raise
            say(f"Standard output cannot be written ({error.strerror}). The result is: {text}")

    try:
        yield result
    finally:
        sys.stdout.flush()
        os.dup2(original, descriptor)
        os.close(original)
