"""One command for the owner of an Azure account: checks `cluster=azure` against its documentation.

    make azure-acceptance ARGS="cluster.size=Standard_NC4as_T4_v3 cluster.budget_usd=5"

Prints the cost and asks, rents two small GPU nodes, checks them, trains for minutes, lets Azure evict one node,
compares the plan with the cost and the time, removes everything, and writes report.md and report.json without secrets,
ids, addresses or host names. Words are those of `launch`. Exit status: 0 when no check failed, 1 when one did, 2 when
nothing was created, 130 when it was interrupted (the cluster is removed before).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.azure_acceptance.cloud import Cloud
from benchmarks.azure_acceptance.commands import Commands, parsed
from benchmarks.azure_acceptance.estimate import Estimate, estimate
from benchmarks.azure_acceptance.report import Report
from benchmarks.azure_acceptance.session import Asked, Session
from launcher.clusters.azure.spec import check_name
from launcher.errors import LaunchError

CLUSTER = {
    "cluster": "azure",
    "cluster.name": "acceptance",
    "cluster.nodes": "2",
    "cluster.spot": "true",
    "cluster.idle_minutes": "2",
}
FIXED = {"cluster": "azure", "cluster.nodes": "2"}
TRAIN = {
    "experiment": "mnist",
    "scaling.workers": "2",
    "scaling.min_workers": "1",
    "trainer.epochs": "100000",
    "trainer.log_every": "20",
    "checkpoint.every": "1000",
}
OWN = ("run.", "checkpoint.load", "cluster.min_nodes", "cluster.down_after", "cluster.detach", "cluster.alternatives")


class Refused(Exception):
    """The run does not start; nothing was created."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make azure-acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="words of launch; cluster.size and a budget at least"
    )
    parser.add_argument("--yes", action="store_true", help="start without a question")
    parser.add_argument("--minutes", type=float, default=3.0, help="how long the run trains before the eviction")
    parser.add_argument("--blob", metavar="abfss://…", help="a directory of Blob storage for a run root")
    parser.add_argument(
        "--train", action="append", default=[], metavar="WORD", help="a word for the run and not the plan"
    )
    parser.add_argument("--out", type=Path, help="directory of the report")
    parser.add_argument("--offline", action="store_true", help="plan with the shipped prices")
    options = parser.parse_intermixed_args(arguments)
    out = options.out or Path(time.strftime("azure-acceptance-%Y%m%d-%H%M%S"))
    try:
        asked = asked_of(options.words, options.train, options.minutes, options.blob)
        cloud = Cloud(asked.name, _value(options.words, "cluster.subscription"))
        # The report is the only file in `out` that may be published.
        commands = Commands(out.resolve() / "work", out.resolve() / "private")
        plan = planned(commands, asked, options.offline)
        if cloud.exists():
            raise Refused(
                f"The resource group {cloud.group} exists, and this run would remove it. Choose another cluster.name, "
                f"or remove it first: launch down {asked.name}."
            )
        confirm(plan, options.yes)
    except (Refused, LaunchError, ValueError) as problem:
        print(f"azure-acceptance: {problem}", file=sys.stderr)
        return 2
    report = Report(out.resolve())
    report.facts = facts_of(asked, options.words)
    report.facts["planned"] = plan.text()
    try:
        Session(asked, plan, commands, cloud, report).run()
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"The report: {out / 'report.md'} and {out / 'report.json'}", file=sys.stderr)
    return 1 if report.failures else 0


def asked_of(words: list[str], train: list[str], minutes: float, blob: str | None) -> Asked:
    """Raises Refused for words that this run sets itself, LaunchError for an invalid Azure name."""
    for word in [*words, *train]:
        key, equals, value = word.partition("=")
        if not equals or key.startswith(OWN) or FIXED.get(key, value) != value:
            raise Refused(f"{word}: this run sets that itself. Omit it; --blob names a run root.")
    for key, example in (("cluster.size", "Standard_NC4as_T4_v3"), ("cluster.budget_usd", "5")):
        if _value(words, key) is None:
            raise Refused(f"{key} is missing. Name it, such as {key}={example}.")
    if blob is not None and not re.fullmatch(r"abfss?://[\w-]+@[\w.]+(/\S*)?", blob):
        raise Refused("--blob is not a directory of Blob storage: abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH.")
    keys = {word.partition("=")[0] for word in words}
    cluster = [f"{key}={value}" for key, value in CLUSTER.items() if key not in keys]
    cluster += [word for word in words if word.startswith(("cluster=", "cluster."))]
    others = [word for word in words if word not in cluster]
    defaults = [f"{key}={value}" for key, value in TRAIN.items() if key not in keys]
    given = {word.partition("=")[0] for word in train}
    job = [*cluster, *defaults, *others]
    return Asked(
        name=check_name(_value(cluster, "cluster.name")),
        cluster=cluster,
        plan=job,
        train=[*(word for word in job if word.partition("=")[0] not in given), *train],
        minutes=minutes,
        idle_minutes=float(_value(cluster, "cluster.idle_minutes") or 2),
        blob=blob,
    )


def _value(words: list[str], key: str) -> str | None:
    return next((word.partition("=")[2] for word in reversed(words) if word.partition("=")[0] == key), None)


def planned(commands: Commands, asked: Asked, offline: bool) -> Estimate:
    """Return the cost estimate. The plan is that of the run on GPUs, independent of `--train`. Creates nothing."""
    done = commands.run("plan", *asked.plan, "--json", *(["--offline"] if offline else []), seconds=600, shows=False)
    if done.status:
        raise Refused(f"`launch plan` refuses: {done.err.strip()}")
    found = estimate(parsed(done), asked.minutes, asked.idle_minutes)
    # The plan predicts the steps of GPUs.
    return replace(found, seconds_per_step=None) if "scaling.device=cpu" in asked.train else found


def confirm(plan: Estimate, yes: bool) -> None:
    """Print the cost and ask. Raises Refused without a yes."""
    print(f"This rents VMs and costs money: {plan.text()}.", file=sys.stderr)
    print(
        "Everything is removed at the end, also after a failure or Ctrl-C. Azure's bill is what counts.",
        file=sys.stderr,
    )
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused("There is no terminal to ask on. Give --yes to start; nothing was created.")
    print("Start? Type yes: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise Refused("Not started; nothing was created.")


def facts_of(asked: Asked, words: list[str]) -> dict[str, str]:
    """Return the report's description of the run, without words that could contain a secret or an address."""
    from launcher.runs.provenance import versions

    shown = (
        "cluster.size",
        "cluster.region",
        "cluster.zone",
        "cluster.spot",
        "cluster.head_size",
        "cluster.budget_usd",
    )
    said = " ".join(f"{key}={value}" for key in shown if (value := _value(asked.cluster, key)) is not None)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "cluster": said,
        "trained": f"{asked.minutes:g} min before the eviction",
    }


if __name__ == "__main__":
    sys.exit(main())
