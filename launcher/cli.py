"""The command line: verbs, words, flags, and what the user is told. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.errors import ConfigError, LaunchError, RunError, Stopped, UserCodeError, did_you_mean

if TYPE_CHECKING:
    from launcher.help import Asked
    from launcher.jobs import Outcome
    from launcher.prepare import Prepared, Request
    from launcher.runs import RunDirectory

USAGE = """\
launch [VERB [NAME]] [HYDRA OVERRIDES...] [HYDRA FLAGS]

  train            run one job (the default when no verb is given); with -m a sweep over several
  plan             print what train would do, and create nothing; --json for programs. With cluster.size=SIZE and
                   cluster.nodes=N: what it would need, take and cost on VMs of Azure (--offline: shipped prices)
  evaluate NAME    evaluate a run's best checkpoint on validation and test data, or on other data: data=OTHER
  predict NAME     print what a run's best checkpoint makes of each input, as JSON lines: input=PATH
  export NAME      write a run's best weights and its network for others to use
  runs             list runs with state, step, loss, workers, time; --json for programs
  logs NAME        show what a run printed, and follow it while it goes on (--no-follow: do not)
  stop NAME        have a run save a checkpoint and stop
  board            serve TensorBoard over the run root; --port N
  sizes            list Azure's NC sizes with GPUs, network, quota family and price; --region NAME, --offline, --json
  status           show the Ray that cluster.keep_minutes keeps on this machine; --json for programs
  down             end it now

  launch experiment=mnist                        train real digits on two workers of this machine
  launch experiment=mnist scaling.workers=4      the same experiment on four
  launch -m optimizer.lr=1e-3,1e-2 model=mlp,convnet    a sweep: every combination
  launch run.name=NAME run.resume=true           continue where a run stopped
  launch VERB --help                             Hydra's help: every group, every key, every default
  launch --config-dir DIR ...                    your own models, data and experiments
"""

# Flag -> (its name here, takes a value).
_FLAGS = {
    "--config-dir": ("config_dir", True),
    "-cd": ("config_dir", True),
    "--port": ("port", True),
    "--host": ("host", True),
    "-m": ("multirun", False),
    "--multirun": ("multirun", False),
    "--json": ("json", False),
    "--no-follow": ("no_follow", False),
    "--region": ("region", True),
    "--offline": ("offline", False),
    "--help": ("help", False),
    "-h": ("help", False),
    "--version": ("version", False),
    # Hydra's own, which show something.
    "--hydra-help": ("hydra_help", False),
    "--cfg": ("cfg", True),
    "-c": ("cfg", True),
    "--info": ("info", True),
    "-i": ("info", True),
    "--package": ("package", True),
    "-p": ("package", True),
    "--resolve": ("resolve", False),
}
# Flags of some verbs alone.
_FLAGS_OF = {
    "multirun": ("train", "plan"),
    "json": ("plan", "runs", "sizes", "status"),
    "region": ("sizes",),
    "offline": ("plan", "sizes"),
    "no_follow": ("logs",),
    "port": ("board",),
    "host": ("board",),
}
_OPTIONAL = {"--info": "all", "-i": "all"}  # what a flag means without its value


@dataclass
class Line:
    """A command line, taken apart."""

    verb: str
    name: str | None
    words: list[str] = field(default_factory=list)
    input: str | None = None  # of predict
    flags: dict[str, str] = field(default_factory=dict)
    explicit: bool = True  # the verb was written, not understood
    started: float = field(default_factory=time.time)

    @property
    def verbose(self) -> bool:
        return any(word.lstrip("+") == "verbose=true" for word in self.words)

    @property
    def config_dir(self) -> Path | None:
        chosen = self.flags.get("config_dir") or os.environ.get("LAUNCH_CONFIG_DIR")
        return Path(chosen).expanduser().absolute() if chosen else None

    def request(self) -> Request:
        from launcher.prepare import Request

        return Request(self.words, self.config_dir, started=self.started)


def main() -> NoReturn:
    """Entry point of `launch` and of `python -m launcher`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit status."""
    verbose = any(word.lstrip("+") == "verbose=true" for word in arguments)
    try:
        line = parse(arguments)
        if _shows(line):
            return 0
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
        _say("This is a bug in launch: the traceback above says where. Please report it with the command given.")
        return 1


def parse(arguments: Sequence[str]) -> Line:
    """Take a command line apart.

    Raises:
        ConfigError: a word is neither a verb nor an override, or a flag is unknown or lacks its value.
    """
    rest = list(arguments)
    line = Line(_verb(rest) or "train", None, explicit=False)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in _FLAGS:
            _take_flag(line, flag, value if equals else None, rest)
        elif word.startswith("-"):
            hint = did_you_mean(word, _FLAGS)
            raise ConfigError(f'"{word}" is no flag of launch.{hint} `launch --help` lists what there is.')
        elif line.verb == "predict" and flag == "input" and value:
            line.input = value
        elif "=" in word or word.startswith("~"):
            line.words.append(word)
        elif word == line.verb and not line.explicit:
            line.explicit = True
        elif line.verb in _NAMED and line.name is None:
            line.name = word
        else:
            raise ConfigError(_neither(word, line))
    if line.verb in _NAMED and line.name is None and "help" not in line.flags:
        wanted = f"launch {line.verb} NAME"
        raise ConfigError(f"launch {line.verb} needs the name of a run: {wanted}. `launch runs` lists them.")
    return line


def _verb(words: Sequence[str]) -> str | None:
    """Return the first word that stands for itself when it is a verb; flags and overrides may come before it."""
    is_value = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if is_value:
            is_value = False
        elif word.startswith("-"):
            is_value = not equals and _FLAGS.get(flag, ("", False))[1]
        elif not equals and not word.startswith("~"):
            return word if word in _VERBS else None
    return None


def _take_flag(line: Line, flag: str, value: str | None, rest: list[str]) -> None:
    name, takes_value = _FLAGS[flag]
    if line.verb not in _FLAGS_OF.get(name, (line.verb,)):
        raise ConfigError(f"{flag} belongs to launch {' and launch '.join(_FLAGS_OF[name])}. Leave it out.")
    if not takes_value:
        if value is not None:
            raise ConfigError(f"{flag} takes no value.")
        line.flags[name] = "yes"
        return
    if value is None and rest and not rest[0].startswith("-") and not (flag in _OPTIONAL and "=" in rest[0]):
        value = rest.pop(0)
    value = value or _OPTIONAL.get(flag)
    if value is None:
        raise ConfigError(f"{flag} needs a value: {flag} {name.upper()}.")
    line.flags[name] = value


def _neither(word: str, line: Line) -> str:
    """Say what a word without `=` may have been meant to be."""
    from launcher.config import sources
    from launcher.words import not_an_override

    if line.verb in _NAMED:
        return f'launch {line.verb} takes one name; "{line.name}" is one, and "{word}" another.'
    near = difflib.get_close_matches(word, _VERBS, n=1, cutoff=0.0)[0]
    groups = sources(line.config_dir).groups()
    hint = not_an_override(word, groups, "").partition("group=option.")[2]
    return (
        f'"{word}" is neither a verb nor an override such as trainer.epochs=3.{hint} The nearest verb is "{near}"; '
        "`launch --help` lists them."
    )


# ---- what is printed ------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _tell(error: LaunchError, verbose: bool) -> int:
    """Print an error, and return the exit status. Of several ranks only the first prints."""
    from launcher import ranks

    if not ranks.speaks():
        return error.exit_status
    if verbose:
        traceback.print_exception(error)
    elif isinstance(error, UserCodeError) and error.traceback_text:
        sys.stderr.write(error.traceback_text.rstrip("\n") + "\n")
    else:
        _say(f"launch: {error}")
    return error.exit_status


@contextmanager
def _results_alone() -> Iterator[Callable[[str], None]]:
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


# ---- help -----------------------------------------------------------------------------------------------------------


def _shows(line: Line) -> bool:
    """Show help, the version, or what one of Hydra's own flags shows; tell whether any of it was asked for."""
    flags = line.flags
    if "version" in flags:
        from launcher.provenance import versions

        print(" ".join(f"{name} {version}" for name, version in versions().items()))
        return True
    of_job = line.explicit and line.verb in _COMPOSING
    if "help" in flags and not of_job:
        print(USAGE, end="")
        return True
    from launcher.help import Asked

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
    if line.verb not in _COMPOSING:
        raise ConfigError(f"launch {line.verb} composes no job: --cfg, --info and their like belong to launch train.")
    _show(line, asked)
    return True


def _show(line: Line, asked: Asked) -> None:
    from launcher import help, prepare, runs

    request = line.request()
    if line.name is None:
        composition = prepare.composed(request)
    else:
        run = runs.find(prepare.root_of(prepare.run_section(request).root), line.name)
        composition = prepare.over_the_run(request, run)[0]
    sys.stdout.write(help.text(asked, composition, request))


# ---- verbs ----------------------------------------------------------------------------------------------------------


def _train(line: Line) -> int:
    if "multirun" in line.flags:
        return _sweep(line)
    from launcher import jobs, ranks, show
    from launcher.terminal import Display

    with _results_alone() as result:
        if not ranks.speaks():
            return _status(jobs.train(line.request(), jobs.Observer()))
        with Display() as display:
            shown = show.Shown(display)
            outcome: Outcome | LaunchError | Stopped
            try:
                outcome = jobs.train(line.request(), shown)
            except (LaunchError, Stopped) as error:
                if shown.directory is None or not shown.directory.exists():
                    raise  # before the start: nothing is there to be named
                outcome = error
        if isinstance(outcome, (LaunchError, Stopped)):
            assert shown.directory is not None
            return _conclude_failure(outcome, shown.directory, result, line.verbose)
        if not shown.finished:
            for text in show.conclusion(outcome, sys.stderr.isatty()):
                _say(text)
        result(outcome.directory.told())
        return _status(outcome)


def _conclude_failure(
    error: LaunchError | Stopped, directory: RunDirectory, result: Callable[[str], None], verbose: bool
) -> int:
    """Tell how a run ended that had started, and where it lies."""
    from launcher import jobs, show

    if isinstance(error, Stopped):
        status = jobs.exit_status_of(error.signal_number)
        _say("stopped at once" if directory.result().get("steps") else "stopped before the first step")
    else:
        status = _tell(error, verbose)
    for text in show.after_failure(directory, error):
        _say(text)
    result(directory.told())
    return status


def _status(outcome: Outcome) -> int:
    from launcher.jobs import exit_status_of

    stopped = outcome.result.get("status", "stopped") == "stopped" and outcome.signal_number is not None
    return exit_status_of(outcome.signal_number) if stopped else 0


def _sweep(line: Line) -> int:
    from launcher import sweeps
    from launcher.sweeps.show import SweepDisplay, conclusion

    with _results_alone() as result:
        with SweepDisplay() as display:
            try:
                outcome = sweeps.run(line.request(), display)
            except Stopped:
                if display.planned_sweep is not None:
                    result(str(display.planned_sweep.directory.path))
                raise
        if not display.finished:
            for text in conclusion(outcome):
                _say(text)
        result(str(outcome.directory.path))
        return sweeps.exit_status(outcome)


def _plan_of_sweep(line: Line) -> int:
    from launcher import sweeps
    from launcher.sweeps.show import SweepDisplay

    with _results_alone() as result:
        with SweepDisplay() as display:
            planned = sweeps.plan(line.request(), display)
        if "json" in line.flags:
            result(json.dumps(sweeps.describe(planned), indent=2))
            return 0
        rows = sweeps.lines(planned)
        width = max(len(what) for what, _ in rows)
        result("\n".join(f"{what:<{width}}  {value}".rstrip() for what, value in rows))
        return 0


def _plan(line: Line) -> int:
    if "multirun" in line.flags:
        return _plan_of_sweep(line)
    from launcher.jobs import checked_plan
    from launcher.prepare import prepare
    from launcher.show import Shown
    from launcher.terminal import Display

    with _results_alone() as result:
        prepared = prepare(line.request())
        if prepared.job.cluster.size is not None:
            return _plan_of_nodes(line, prepared, result)
        with Display() as display:
            plan = checked_plan(prepared.job, Shown(display))
        if "json" in line.flags:
            facts = {"run": prepared.directory.name, "directory": prepared.directory.told()}
            result(json.dumps({**facts, **plan.to_dict()}, indent=2))
            return 0
        rows = [("run", prepared.directory.told()), *plan.lines()]
        width = max(len(what) for what, _ in rows)
        result("\n".join(f"{what:<{width}}  {value}" for what, value in rows))
    return 0


def _plan_of_nodes(line: Line, prepared: Prepared, result: Callable[[str], None]) -> int:
    from launcher.jobs import checked_node_plan
    from launcher.node_tables import text
    from launcher.show import Shown
    from launcher.terminal import Display

    with Display() as display:
        plan = checked_node_plan(prepared, Shown(display), ask="offline" not in line.flags)
    path = str(prepared.directory.path)
    if "json" in line.flags:
        result(json.dumps({"run": prepared.directory.name, "directory": path, **plan.to_dict()}, indent=2))
    else:
        result(text(plan, path, width=shutil.get_terminal_size((120, 24)).columns))
    return 0


def _evaluate(line: Line) -> int:
    from launcher import jobs, ranks, trained
    from launcher.show import Shown
    from launcher.terminal import Display

    assert line.name is not None
    with _results_alone() as result:
        if not ranks.speaks():
            trained.evaluate(line.name, line.request(), jobs.Observer())
            return 0
        with Display() as display:
            metrics = trained.evaluate(line.name, line.request(), Shown(display))
        result(json.dumps(metrics))
    return 0


def _predict(line: Line) -> int:
    from launcher import ranks, trained
    from launcher.show import Shown
    from launcher.terminal import Display

    assert line.name is not None
    if line.input is None:
        wanted = f"launch predict {line.name} input=PATH"
        raise ConfigError(f"launch predict needs the inputs: {wanted}, a file or folder that the run's data can read.")
    if not ranks.speaks():  # of several ranks one is enough
        return 0
    with _results_alone() as result, Display() as display:

        def take(prediction: dict[str, Any]) -> None:
            try:
                result(json.dumps(prediction))
            except BrokenPipeError:  # `launch predict … | head`: nobody listens any more
                raise Stopped(signal.SIGPIPE) from None

        trained.predict(line.name, line.request(), line.input, Shown(display), take)
    return 0


def _export(line: Line) -> int:
    from launcher import ranks, runs, trained
    from launcher.errors import ExportError
    from launcher.show import Shown
    from launcher.terminal import Display

    assert line.name is not None
    if not ranks.speaks():
        return 0
    with _results_alone() as result:
        folders: list[Path] = []
        try:
            with Display() as display:
                trained.export(line.name, line.request(), Shown(display), folders.append)
        except ExportError:
            result(runs.RunDirectory(folders[-1].parent).told(folders[-1]))  # the weights are there
            raise
        result(runs.RunDirectory(folders[-1].parent).told(folders[-1]))
    return 0


def _root(line: Line) -> Path:
    """Return the run root for a verb that composes no job; other words than `run.root` would mean nothing to it."""
    from launcher.prepare import key_of, root_of, run_section
    from launcher.words import shown

    for word in line.words:
        if key_of(word) != "run.root":
            raise ConfigError(f'"{shown(word)}" means nothing to launch {line.verb}; it takes run.root=DIRECTORY.')
    return root_of(run_section(line.request()).root)


def _runs(line: Line) -> int:
    from launcher.listing import rows, table

    root = _root(line)
    found = rows(root)
    if "json" in line.flags:
        print(json.dumps(found, indent=2))
    else:
        table(found, root)
    return 0


def _logs(line: Line) -> int:
    from launcher import runs
    from launcher.listing import follow

    assert line.name is not None
    follow(runs.find(_root(line), line.name), "no_follow" not in line.flags)
    return 0


def _stop(line: Line) -> int:
    from launcher import runs
    from launcher.listing import stop

    assert line.name is not None
    run = runs.find(_root(line), line.name)
    _say(stop(run))
    print(run.told())
    return 0


def _board(line: Line) -> int:
    root = _root(line)
    port, host = line.flags.get("port", "6006"), line.flags.get("host", "127.0.0.1")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--port {port}: a port is a number from 1 to 65535, such as 6006.")
    if not root.is_dir():
        raise RunError(f"There is no run root {root} yet. Train something first, or name another: run.root=DIRECTORY.")
    shown = RunDirectory(root / "run").root
    _say(f"TensorBoard over {shown}: http://{host}:{port} (Ctrl-C ends it)")
    options = ["--logdir", str(root), "--host", host, "--port", port, "--reload_multifile=true", "--reload_interval=5"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    if shown != str(root):
        from launcher.mirror import board

        return board(root, command, _say)
    # One process less, and Ctrl-C reaches TensorBoard itself.
    os.execv(sys.executable, command)


def _sizes(line: Line) -> int:
    from launcher import sizes

    if line.words:
        raise ConfigError(
            f'launch sizes takes no overrides, but found "{line.words[0]}". --region NAME chooses a region.'
        )
    region = line.flags.get("region", sizes.REGION)
    if not region.isalnum():
        raise ConfigError(f"--region {region}: the name of an Azure region is letters and digits, such as eastus.")
    found, source = sizes.known(region.lower(), ask="offline" not in line.flags)
    if "json" in line.flags:
        _say(source)
        print(json.dumps(sizes.rows(found, region.lower()), indent=2))
    else:
        sizes.table(found, region.lower(), source)
    return 0


def _status_of_clusters(line: Line) -> int:
    from launcher import machines

    _no_words(line)
    clusters = machines.status()
    print(json.dumps(clusters, indent=2) if "json" in line.flags else machines.told(clusters))
    return 0


def _down(line: Line) -> int:
    from launcher import machines

    _no_words(line)
    gone, text = machines.down()
    _say(text if gone else f"launch: {text}")
    return 0 if gone else 1


def _no_words(line: Line) -> None:
    from launcher.words import shown

    if line.words:
        raise ConfigError(f'"{shown(line.words[0])}" means nothing to launch {line.verb}. Leave it out.')


_VERBS: dict[str, Callable[[Line], int]] = {
    "train": _train,
    "plan": _plan,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "runs": _runs,
    "logs": _logs,
    "stop": _stop,
    "board": _board,
    "sizes": _sizes,
    "status": _status_of_clusters,
    "down": _down,
}
_NAMED = ("evaluate", "predict", "export", "logs", "stop")
_COMPOSING = ("train", "plan", "evaluate", "predict", "export")
