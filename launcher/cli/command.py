"""Runs a command line: parses it, shows help or calls the verb, and turns errors into exit statuses."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence

from launcher.cli import completion, help
from launcher.cli.line import Line, is_verbose, parse
from launcher.cli.output import report, say
from launcher.cli.verbs import VERBS
from launcher.errors import LaunchError, Stopped
from launcher.runs.provenance import versions


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status."""
    trains = False
    try:
        line = parse(arguments)
        if _show(line):
            return 0
        trains = line.verb == "train"
        return VERBS[line.verb].run(line)
    except LaunchError as error:
        return report(error, is_verbose(arguments))
    except Stopped as stopped:
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if _is_output_error(error) and not trains:
            if isinstance(error, BrokenPipeError):  # `launch logs NAME | head`
                return 0
            say(f"launch: Standard output cannot be written: {error}.")
            return 1
        say(traceback.format_exc().rstrip("\n"))
        say("This is a bug in launch; the traceback is above. Please report it together with the command.")
        return 1


def _is_output_error(error: Exception) -> bool:
    """Return whether an exception is about a pipe, terminal or disk to which standard output is written."""
    numbers = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EDQUOT)
    return isinstance(error, OSError) and error.filename is None and error.errno in numbers


def _show(line: Line) -> bool:
    """Show the help, the version or what one of Hydra's flags requests. Return False if there is no such flag."""
    verb = VERBS[line.verb]
    if "install_completion" in line.flags:
        say(completion.install(line.flags["install_completion"]))
        return True
    if "version" in line.flags:
        print(" ".join(f"{name} {version}" for name, version in versions().items()))
        return True
    if "help" in line.flags:
        print(help.about_verb(verb, help.groups_of(line)) if line.explicit else help.overview(), end="")
        return True
    if not line.flags.keys() & {"cfg", "info", "package", "resolve", "hydra_help"}:
        return False
    from launcher.cli import hydra_help  # imports Hydra

    sys.stdout.write(hydra_help.show(line))
    return True
