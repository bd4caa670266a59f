"""The tables of verbs and flags. Parsing, help and completion all read them.

The module of a verb is imported when the verb runs, so that `launch --help` responds immediately.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from launcher.cli.line import Line


@dataclass(frozen=True)
class Flag:
    """One flag of the command line.

    Attributes:
        name: its key in `Line.flags`.
        spellings: how it is written, the long form first.
        meaning: its line of `launch VERB --help`.
        value: the placeholder of its value in help, or None for a switch.
        default: its value if the command line gives none; None if the value is required.
        is_common: every verb takes it; other flags are listed by their verbs.
        composes: every verb that composes a job takes it as well.
    """

    name: str
    spellings: tuple[str, ...]
    meaning: str
    value: str | None = None
    default: str | None = None
    is_common: bool = False
    composes: bool = False

    @property
    def usage(self) -> str:
        """Return the flag as help shows it: `--port N`."""
        long = self.spellings[0]
        return long if self.value is None else f"{long} {self.value}"


FLAGS = (
    Flag("multirun", ("--multirun", "-m"), "run a sweep: one trial for each combination of values"),
    Flag("json", ("--json",), "print JSON, for programs"),
    Flag("offline", ("--offline",), "use the prices that launch ships instead of today's prices"),
    Flag("no_follow", ("--no-follow",), "print the log so far and exit"),
    Flag("port", ("--port",), "port of the server (6006)", "N"),
    Flag("host", ("--host",), "address to listen on (127.0.0.1)", "HOST"),
    Flag("open", ("--open",), "open the page in a browser"),
    Flag("region", ("--region",), "Azure region of the prices (eastus)", "NAME"),
    Flag("partial", ("--partial",), "accept a cluster without the hosts that cannot be used"),
    Flag("save", ("--save",), "save a checkpoint of each active run first"),
    Flag("force", ("--force",), "do not wait for active runs, and save nothing"),
    Flag("forget", ("--forget",), "delete only the local record; leave the machines as they are"),
    Flag("config_dir", ("--config-dir", "-cd"), "your own models, data and experiments", "DIR", is_common=True),
    Flag("help", ("--help", "-h"), "show this help", is_common=True),
    Flag("version", ("--version",), "print the versions of launch, PyTorch and Ray", is_common=True),
    Flag("install_completion", ("--install-completion",), "install tab completion: bash, zsh or fish", "SHELL"),
    Flag("cfg", ("--cfg", "-c"), "print the composed configuration: job, hydra or all", "WHAT", composes=True),
    Flag(
        "info", ("--info", "-i"), "print how it is composed: defaults, config, searchpath", "WHAT", "all", composes=True
    ),
    Flag("package", ("--package", "-p"), "with --cfg: print one section only", "SECTION", composes=True),
    Flag("resolve", ("--resolve",), "with --cfg: resolve interpolations", composes=True),
    Flag("hydra_help", ("--hydra-help",), "print the help of Hydra", composes=True),
)


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        module: the module of launcher.cli that holds a function with the verb's name, `(Line) -> exit status`.
        summary: its line of `launch --help`.
        named: what NAME is: a run, or two runs, which are required; a cluster or a key, which are optional; None
            without a name.
        composes: whether it composes the configuration of a job, and so accepts groups, keys and Hydra's flags.
        flags: the names of the flags that only some verbs accept.
        details: further lines of `launch VERB --help`.
    """

    name: str
    module: str
    summary: str
    named: Literal["run", "runs", "cluster", "key"] | None = None
    composes: bool = False
    flags: tuple[str, ...] = ()
    details: str = ""

    def run(self, line: Line) -> int:
        """Run the verb and return the exit status."""
        function: Callable[[Line], int] = getattr(importlib.import_module(f"launcher.cli.{self.module}"), self.name)
        return function(line)

    @property
    def usage(self) -> str:
        """Return the verb with its name, as `launch --help` shows it."""
        return self.name + {"run": " NAME", "runs": " A B", "cluster": " [NAME]", "key": " [KEY]", None: ""}[self.named]

    def accepts(self, flag: Flag) -> bool:
        """Return whether the flag belongs to this verb."""
        return flag.is_common or flag.name in self.flags or (flag.composes and self.composes)


_ALL = (
    Verb("train", "training", "train one job (the default verb); with -m a sweep", composes=True, flags=("multirun",)),
    Verb(
        "plan",
        "planning",
        "print what train would do, without doing it",
        composes=True,
        flags=("multirun", "json", "offline"),
        details="With cluster.size=SIZE cluster.nodes=N: memory, time and cost on Azure VMs.",
    ),
    Verb(
        "evaluate",
        "trained",
        "evaluate a run's best checkpoint",
        named="run",
        composes=True,
        details="On the run's data, or data=OTHER. rows=FILE.parquet writes a row per sample.",
    ),
    Verb(
        "predict",
        "trained",
        "print predictions of a run's best checkpoint: input=PATH",
        named="run",
        composes=True,
        details="One JSON line for each input in the file or folder PATH.",
    ),
    Verb("export", "trained", "write a run's best weights and its network", named="run", composes=True),
    Verb(
        "runs",
        "runs",
        "list runs with state, step, loss, workers, time, cost",
        flags=("json",),
        details="state=failed,lost  last=7d  sort=best or sort=-KEY  columns=KEY,TAG",
    ),
    Verb("diff", "diff", "compare two runs: configuration, code, results", named="runs", flags=("json",)),
    Verb("logs", "runs", "print the log of a run and follow it", named="run", flags=("no_follow",)),
    Verb("stop", "runs", "save a checkpoint of a run and stop the run", named="run"),
    Verb("rm", "rm", "remove a run and its files, unless it is active", named="run"),
    Verb("board", "board", "serve TensorBoard for all runs", flags=("port", "host", "open")),
    Verb("sizes", "sizes", "list Azure NC sizes: GPUs, network, quota, price", flags=("region", "offline", "json")),
    Verb(
        "up",
        "up",
        "create a cluster: cluster=ssh cluster.hosts=[HEAD,HOST]",
        composes=True,
        flags=("partial",),
        details="Idempotent: parts of the cluster that are running already are left unchanged.",
    ),
    Verb(
        "status",
        "clusters",
        "list my clusters with hosts, cost and SSH command",
        named="cluster",
        flags=("json",),
    ),
    Verb(
        "down",
        "clusters",
        "stop a cluster and check that nothing is left",
        named="cluster",
        flags=("save", "force", "forget"),
    ),
    Verb("help", "help", "explain a configuration key, a section or a verb", named="key"),
)
VERBS: dict[str, Verb] = {verb.name: verb for verb in _ALL}
