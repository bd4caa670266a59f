"""The verbs as one table: what each is called, what it takes, what `launch --help` says of it, and where it is done.

A verb's module is imported when the verb is used, so that `launch --help` answers at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from launcher.cli.line import Line


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Attributes:
        module: the module of launcher.cli that holds a function of the verb's name, `(Line) -> exit status`.
        summary: its lines of `launch --help`.
        named: what NAME stands for: a run, which must be given; a cluster or a key, which may be; None without a name.
        composes: whether it has the configuration of a job, and so Hydra's flags.
        flags: the flags that only some verbs take, see `launcher.cli.line`.
    """

    name: str
    module: str
    summary: str
    named: Literal["run", "cluster", "key"] | None = None
    composes: bool = False
    flags: tuple[str, ...] = ()

    def run(self, line: Line) -> int:
        """Do it, and return the exit status."""
        done: Callable[[Line], int] = getattr(importlib.import_module(f"launcher.cli.{self.module}"), self.name)
        return done(line)

    @property
    def usage(self) -> str:
        """The verb with its name, as `launch --help` shows it."""
        return self.name + {"run": " NAME", "cluster": " [NAME]", "key": " [KEY]", None: ""}[self.named]


_ALL = (
    Verb(
        "train",
        "training",
        "run one job (the default when no verb is given); with -m a sweep over several",
        composes=True,
        flags=("multirun",),
    ),
    Verb(
        "plan",
        "planning",
        "print what train would do, and create nothing; --json for programs. With cluster.size=SIZE and\n"
        "cluster.nodes=N: what it would need, take and cost on VMs of Azure (--offline: shipped prices)",
        composes=True,
        flags=("multirun", "json", "offline"),
    ),
    Verb(
        "evaluate",
        "trained",
        "evaluate a run's best checkpoint on validation and test data, or on other data: data=OTHER",
        named="run",
        composes=True,
    ),
    Verb(
        "predict",
        "trained",
        "print what a run's best checkpoint makes of each input, as JSON lines: input=PATH",
        named="run",
        composes=True,
    ),
    Verb(
        "export",
        "trained",
        "write a run's best weights and its network for others to use",
        named="run",
        composes=True,
    ),
    Verb("runs", "runs", "list runs with state, step, loss, workers, time; --json for programs", flags=("json",)),
    Verb(
        "logs",
        "runs",
        "show what a run printed, and follow it while it goes on (--no-follow: do not)",
        named="run",
        flags=("no_follow",),
    ),
    Verb("stop", "runs", "have a run save a checkpoint and stop", named="run"),
    Verb("board", "runs", "serve TensorBoard over the run root; --port N, --open", flags=("port", "open", "host")),
    Verb(
        "sizes",
        "clusters",
        "list Azure's NC sizes with GPUs, network, quota family and price; --region NAME, --offline, --json",
        flags=("region", "offline", "json"),
    ),
    Verb(
        "up",
        "clusters",
        "make a cluster: cluster=ssh cluster.hosts=[HEAD,HOST,...]; what runs already is left alone",
        composes=True,
    ),
    Verb(
        "status",
        "clusters",
        "show all clusters of mine with their hosts and SSH line, or one; --json for programs",
        named="cluster",
        flags=("json",),
    ),
    Verb(
        "down",
        "clusters",
        "end every process of a cluster, and see that none is left (--save: save its runs first; --force: do not save; "
        "--forget: only forget it)",
        named="cluster",
        flags=("forget", "force", "save"),
    ),
    Verb(
        "help",
        "help",
        "explain a key of the configuration (launch help trainer.precision), a section of it, or a verb",
        named="key",
    ),
)
VERBS: dict[str, Verb] = {verb.name: verb for verb in _ALL}


def table() -> str:
    """Return the verbs with their summaries, as `launch --help` lists them."""
    lines = []
    for verb in VERBS.values():
        first, *more = verb.summary.splitlines()
        lines += [f"  {verb.usage:<16} {first}", *(" " * 19 + line for line in more)]
    return "\n".join(lines)
