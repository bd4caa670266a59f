"""The command line: verbs, words, flags, and what the user is told. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.errors import ConfigError, LaunchError, RequestError, Stopped, UserCodeError, did_you_mean

if TYPE_CHECKING:
    from launcher.jobs import Prepared
    from launcher.plan import Plan

USAGE = """\
launch [VERB [NAME]] [HYDRA OVERRIDES...] [HYDRA FLAGS]

  train            run one job (the default when no verb is given)
  plan             print what train would do, and create nothing; --json for programs
  evaluate NAME    evaluate a run's best checkpoint on validation and test data
  runs             list runs with state, step, loss, workers, time; --json for programs
  logs NAME        show what a run printed, and follow it while it goes on
  stop NAME        have a run save a checkpoint and stop
  board            serve TensorBoard over the run root; --port N

  launch experiment=mnist                        train real digits on two workers of this machine
  launch experiment=mnist scaling.workers=4      the same experiment on four
  launch run.name=NAME run.resume=true           continue where a run stopped
  launch VERB --help                             Hydra's help: every group, every key, every default
  launch --config-dir DIR ...                    your own models, data and experiments
"""

_FLAGS_WITH_VALUE = {"--config-dir": "config_dir", "-cd": "config_dir", "--port": "port", "--host": "host"}
_FLAGS = {"--json": "json", "--help": "help", "-h": "help", "--version": "version", "--no-follow": "no_follow"}
# Hydra's own, which only show something.
_HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p", "--hydra-help", "--shell-completion", "-sc")


@dataclass
class Line:
    """A command line, taken apart."""

    verb: str
    name: str | None
    words: list[str]
    flags: dict[str, str]
    hydra: list[str]
    explicit: bool = True  # the verb was written, not understood

    @property
    def config_dir(self) -> Path | None:
        chosen = self.flags.get("config_dir") or os.environ.get("LAUNCH_CONFIG_DIR")
        return Path(chosen).expanduser().absolute() if chosen else None


def main() -> NoReturn:
    """Entry point of `launch` and of `python -m launcher`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit status."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the console script's path begins with its own directory
    verbose = "verbose=true" in arguments
    try:
        line = parse(arguments)
        return _VERBS[line.verb](line)
    except LaunchError as error:
        return _tell(error, verbose)
    except Stopped as stopped:
        from launcher.jobs import exit_status_of

        return exit_status_of(stopped.signal_number)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `launch logs NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        _say("This is a bug in launch: the traceback above says where. Please report it with the command that you gave.")
        return 1


def parse(arguments: Sequence[str]) -> Line:
    """Take a command line apart.

    Raises:
        ConfigError: a word is neither a verb nor an override, or a flag is unknown or lacks its value.
    """
    rest = list(arguments)
    explicit = bool(rest) and rest[0] in _VERBS
    verb = rest.pop(0) if explicit else "train"
    name = None
    if verb in _NAMED:
        if rest and "=" not in rest[0] and not rest[0].startswith("-"):
            name = rest.pop(0)
        elif not {"--help", "-h"} & set(rest):
            raise ConfigError(f"launch {verb} needs the name of a run: launch {verb} NAME. `launch runs` lists them.")
    line = Line(verb, name, [], {}, [], explicit)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in _FLAGS_WITH_VALUE:
            if not equals and not rest:
                raise ConfigError(f"{flag} needs a value.")
            line.flags[_FLAGS_WITH_VALUE[flag]] = value if equals else rest.pop(0)
        elif word in _FLAGS:
            line.flags[_FLAGS[word]] = "yes"
        elif word in ("-m", "--multirun"):
            raise ConfigError(f"{word}: sweeps are not part of this version. Give one value for each key.")
        elif flag in _HYDRA_FLAGS:
            line.hydra.append(word)
            if flag in ("--cfg", "-c", "--package", "-p") and not equals and rest:
                line.hydra.append(rest.pop(0))
        elif word.startswith("-"):
            known = [*_FLAGS, *_FLAGS_WITH_VALUE, *_HYDRA_FLAGS]
            raise ConfigError(f'"{word}" is no flag of launch.{did_you_mean(word, known)} `launch --help` lists what there is.')
        elif "=" not in word and not word.startswith("~"):
            raise ConfigError(_neither(word))
        else:
            line.words.append(word)
    return line


def _neither(word: str) -> str:
    near = difflib.get_close_matches(word, _VERBS, n=1, cutoff=0.1)
    hint = f' The nearest verb is "{near[0]}".' if near else ""
    return f'"{word}" is neither a verb nor an override such as trainer.epochs=3.{hint} `launch --help` lists the verbs.'


# ---- what is printed ------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _tell(error: LaunchError, verbose: bool) -> int:
    """Print an error, and return the exit status."""
    if isinstance(error, UserCodeError) and error.traceback_text:
        sys.stderr.write(error.traceback_text.rstrip("\n") + "\n")
    elif verbose:
        traceback.print_exception(error)
        return error.exit_status
    else:
        _say(f"{_label(error)}: {error}")
    return error.exit_status


def _label(error: LaunchError) -> str:
    return "launch" if isinstance(error, RequestError) else type(error).__name__


# ---- verbs ----------------------------------------------------------------------------------------------------------


def _help(line: Line) -> bool:
    """Show help, or what one of Hydra's own flags shows; tell whether that is all that was asked for."""
    if "version" in line.flags:
        from launcher.provenance import versions

        print(" ".join(f"{name} {version}" for name, version in versions().items()))
        return True
    if "help" not in line.flags and not line.hydra:
        return False
    if not line.hydra and (not line.explicit or line.verb not in _COMPOSING):
        print(USAGE, end="")
    else:
        _show_by_hydra(line)
    return True


def _show_by_hydra(line: Line) -> None:
    """Let Hydra show its help, or what `--cfg`, `--info` and their like ask for."""
    import hydra

    from launcher.config import CONF, compose

    # First our own composition, whose checks Hydra's lacks: nothing in the configuration may have Hydra call things.
    compose(line.words, line.config_dir)
    words = list(line.words)
    if line.config_dir is not None:
        words.append(f"hydra.searchpath=[file://{CONF}]")
    arguments, sys.argv = sys.argv, ["launch", *words, *(["--help"] if "help" in line.flags else []), *line.hydra]
    try:
        primary = line.config_dir or CONF
        if not (primary / "config.yaml").is_file():
            primary = CONF
            sys.argv += ["--config-dir", str(line.config_dir)]
        hydra.main(version_base="1.3", config_path=str(primary), config_name="config")(lambda config: None)()
    finally:
        sys.argv = arguments


def _request(line: Line) -> Any:
    from launcher.jobs import Request

    return Request(line.words, line.config_dir)


def _train(line: Line) -> int:
    if _help(line):
        return 0
    from launcher import jobs
    from launcher.terminal import Display

    quiet = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) > 0
    try:
        with Display() as display:
            outcome = jobs.train(_request(line), _Shown(display))
    except RequestError as error:
        if quiet:
            return error.exit_status
        raise
    if quiet:
        return 0
    _conclude(outcome)
    return jobs.exit_status_of(outcome.signal_number) if _was_signalled(outcome) else 0


def _was_signalled(outcome: Any) -> bool:
    return outcome.result.get("status") == "stopped" and outcome.signal_number is not None


def _conclude(outcome: Any) -> None:
    from launcher.terminal import duration

    result, directory = outcome.result, outcome.directory
    metrics = "  ".join(
        f"{tag} {value:.4f}" for tag, value in result.get("metrics", {}).items() if tag.startswith("val/") and value is not None
    )
    _say(f"{result.get('status')} after {result.get('steps')} steps in {duration(result.get('seconds') or 0)}  {metrics}".rstrip())
    if result.get("status") == "stopped":
        _say(f"Continue with: launch run.name={directory.name} run.resume=true")
    elif sys.stderr.isatty():
        _say("Watch it in TensorBoard with: launch board")
    print(directory.path)


class _Shown:
    """Shows a run on the terminal."""

    def __init__(self, display: Any) -> None:
        self._display = display

    def prepared(self, prepared: Prepared, plan: Plan | None) -> None:
        name = prepared.directory.name
        if prepared.finished:
            self._display.say(f"{name} is completed; there is nothing to do. Train it further with trainer.epochs=N.")
            return
        assert plan is not None
        self._display.workers = plan.machines.workers
        self._display.say(f"{name}: {plan.headline()}")
        if prepared.resumes and prepared.composition.words:
            self._display.say(f"Over the run's own configuration: {' '.join(prepared.composition.shown_words())}")

    def event(self, event: dict[str, Any]) -> None:
        self._display.show(event)


def _plan(line: Line) -> int:
    if _help(line):
        return 0
    from launcher.jobs import prepare
    from launcher.plan import make_plan

    prepared = prepare(_request(line))
    plan = make_plan(prepared.job)
    if "json" in line.flags:
        print(json.dumps({"run": prepared.directory.name, "directory": str(prepared.directory.path), **plan.to_dict()}, indent=2))
        return 0
    rows = [("run", str(prepared.directory.path)), *plan.lines()]
    width = max(len(what) for what, _ in rows)
    print("\n".join(f"{what:<{width}}  {value}" for what, value in rows))
    return 0


def _evaluate(line: Line) -> int:
    if _help(line):
        return 0
    from launcher.jobs import evaluate
    from launcher.terminal import Display

    assert line.name is not None
    with Display() as display:
        metrics = evaluate(line.name, _request(line), _Shown(display))
    if metrics:
        print(json.dumps(metrics))
    return 0


def _root(line: Line) -> Path:
    from launcher.config import compose

    root = compose([word for word in line.words if word.startswith("run.root=")], line.config_dir).job.run.root
    return Path(root).expanduser().absolute()


def _runs(line: Line) -> int:
    if _help(line):
        return 0
    from launcher.listing import rows, table

    found = rows(_root(line))
    if "json" in line.flags:
        print(json.dumps(found, indent=2))
    else:
        table(found, _root(line))
    return 0


def _logs(line: Line) -> int:
    if _help(line):
        return 0
    from launcher import runs
    from launcher.listing import follow

    assert line.name is not None
    follow(runs.find(_root(line), line.name), "no_follow" not in line.flags)
    return 0


def _stop(line: Line) -> int:
    if _help(line):
        return 0
    from launcher import runs
    from launcher.listing import stop

    assert line.name is not None
    run = runs.find(_root(line), line.name)
    _say(stop(run))
    print(run.path)
    return 0


def _board(line: Line) -> int:
    if _help(line):
        return 0
    root = _root(line)
    port, host = line.flags.get("port", "6006"), line.flags.get("host", "127.0.0.1")
    if not port.isdigit():
        raise ConfigError(f"--port {port}: a port is a number, such as 6006.")
    root.mkdir(parents=True, exist_ok=True)
    _say(f"TensorBoard over {root}: http://{host}:{port} (Ctrl-C ends it)")
    # One process less, and Ctrl-C reaches TensorBoard itself.
    options = ["--logdir", str(root), "--host", host, "--port", port, "--reload_multifile=true", "--reload_interval=5"]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *options])


_VERBS: dict[str, Callable[[Line], int]] = {
    "train": _train,
    "plan": _plan,
    "evaluate": _evaluate,
    "runs": _runs,
    "logs": _logs,
    "stop": _stop,
    "board": _board,
}
_NAMED = ("evaluate", "logs", "stop")
_COMPOSING = ("train", "plan", "evaluate")
