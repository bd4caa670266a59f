"""The command line: from its words to a verb, and from an error to an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from launcher.cli.line import USAGE, Line, parse
from launcher.cli.open_port import confirmed
from launcher.cli.output import say, tell
from launcher.cli.verbs import VERBS
from launcher.config.calling_directory import guard
from launcher.errors import ConfigError, LaunchError, Stopped

if TYPE_CHECKING:
    from launcher.cli.hydra_help import Asked


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit status."""
    verbose = any(word.lstrip("+") == "verbose=true" for word in arguments)
    with suppress(FileNotFoundError):  # the directory was removed
        guard(os.curdir)
    try:
        line = parse(arguments)
        if _shows(line):
            return 0
        if line.verb in ("up", "train"):
            line.words = confirmed(line.words)
        return VERBS[line.verb].run(line)
    except LaunchError as error:
        return tell(error, verbose)
    except Stopped as stopped:
        from launcher.jobs.training import exit_status_of

        return exit_status_of(stopped.signal_number)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `launch logs NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        say(traceback.format_exc().rstrip("\n"))
        say("This is a bug in launch: the traceback above says where. Please report it with the command given.")
        return 1


# ---- help ------------------------------------------------------------------------------------------------------------


def _shows(line: Line) -> bool:
    """Show help, the version, or what one of Hydra's own flags shows; tell whether any of it was asked for."""
    flags = line.flags
    if "version" in flags:
        from launcher.runs.provenance import versions

        print(" ".join(f"{name} {version}" for name, version in versions().items()))
        return True
    of_job = line.explicit and VERBS[line.verb].composes
    if "help" in flags and not of_job:
        print(USAGE, end="")
        return True
    from launcher.cli.hydra_help import Asked

    asked = Asked(
        help="help" in flags,
        hydra_help="hydra_help" in flags,
        cfg=flags.get("cfg"),
        info=flags.get("info"),
        package=flags.get("package"),
        resolve="resolve" in flags,
    )
    if not asked:
        return False
    if not VERBS[line.verb].composes:
        raise ConfigError(f"launch {line.verb} composes no job: --cfg, --info and their like belong to launch train.")
    _show(line, asked)
    return True


def _show(line: Line, asked: Asked) -> None:
    from launcher import runs
    from launcher.cli import hydra_help
    from launcher.jobs import prepare

    request = line.request()
    if line.name is None:
        composition = prepare.composed(request)
    else:
        run = runs.find(prepare.root_of(prepare.run_section(request).root), line.name)
        composition = prepare.over_the_run(request, run)[0]
    sys.stdout.write(hydra_help.text(asked, composition, request))
