"""Measures the seconds of the commands for a cluster of SSH hosts, by parts.

    python benchmarks/ssh_cluster.py                          two hosts, three rounds, about five minutes
    python benchmarks/ssh_cluster.py --json FILE              the same, and the figures as JSON
    python benchmarks/ssh_cluster.py --ipv6                   hosts with IPv6 addresses only

The hosts are the machines of the tests (tests/support/vmlab): network namespaces with real SSH servers, on which an
environment exists already. One round is `launch up`, `launch up` again, a run of two workers (one on each host),
`launch status`, `launch status` with a host that does not answer, and `launch down`. A part ends with a line of the
command, or is a phase in result.json. It needs root. All hosts share the CPUs of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Failed
from tests.support.vmlab import ssh_lab
from tests.support.vmlab.ssh_lab import SshLab

JOB = ("--config-dir", "own", "experiment=toy", "trainer.log_every=1", "scaling.workers=2", "scaling.cpus_per_worker=2")
# Texts in the lines of a command, in the order in which they are printed, and the part that each ends.
UP = {"Sending launch": "inspect", "as the head": "send_and_start_head", "as a node": "start_nodes", "is up": "probe"}
RUN = {"Sending launch": "inspect", ": sent to": "submit", "CPU workers": "driver", "step 1/": "first_step"}
LIMITS = {"up": 8.0, "up_again": 1.5, "status_silent_host": 10.0, "run.first_step": 10.0, "run.process_group": 2.0}
SECONDS = 300.0  # the time limit of each command

Parts = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--ipv6", action="store_true")
    options = parser.parse_args()
    if problem := ssh_lab.why_not():
        sys.exit(problem)
    load = os.getloadavg()[0]
    with SshLab(2, ipv6=options.ipv6) as lab:
        rounds = [measure(lab, number) for number in range(options.rounds)]
    median = {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
    report = {"load_at_start": round(load, 1), "limits": LIMITS, "median": median, "rounds": rounds}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    missed = [
        f"{name} is {median[name]:.1f} s, limit {most:g} s" for name, most in LIMITS.items() if median[name] > most
    ]
    print("\n".join(missed) or "All limits hold.", file=sys.stderr)


def measure(lab: SshLab, number: int) -> Parts:
    """Run one round, and return the seconds of each command, and of its parts as COMMAND.PART."""
    words, run = lab.words(), f"run.name=round{number}"
    found = timed(lab, "up", UP, "up", *words)
    found |= timed(lab, "up_again", {"is up": "all"}, "up", *words)
    found |= timed(lab, "run", RUN, *JOB, *words, run)
    # Seconds from the command to the first step, and the phases within the time of the driver.
    parts = [f"run.{part}" for part in RUN.values()]
    found["run.first_step"] = sum(found[part] for part in parts)
    result: dict[str, Any] = json.loads((lab.calling / "runs" / f"round{number}" / "result.json").read_text())
    found |= {f"run.{phase}": seconds for phase, seconds in result["phases"].items() if phase != "first_step"}
    found |= timed(lab, "status", {}, "status")
    lab.machines[1].cut()
    try:
        found |= timed(lab, "status_silent_host", {}, "status")
    finally:
        lab.machines[1].restore_link()
    return found | timed(lab, "down", {}, "down", "ssh")


def timed(lab: SshLab, name: str, ends: dict[str, str], *words: str) -> Parts:
    """Run `launch` on the laptop, and return its seconds, and those of the parts that lines of standard error end.

    Raises:
        Failed: the command failed, or a line is missing.
    """
    begun = time.monotonic()
    process = subprocess.Popen(
        lab.laptop.command(["timeout", str(SECONDS), *lab.command(*words)], lab.calling),
        env=lab.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    found: Parts = {}
    remaining, since, lines = dict(ends), begun, []
    for line in process.stderr:
        lines.append(line)
        text = next(iter(remaining), None)
        if text is not None and text in line:
            found[f"{name}.{remaining.pop(text)}"] = time.monotonic() - since
            since = time.monotonic()
    if process.wait() != 0 or remaining:
        raise Failed(f"`launch {' '.join(words)}` ended with {process.returncode}:\n{''.join(lines)[-3000:]}")
    found[name] = time.monotonic() - begun
    print(f"{name} {found[name]:.1f} s", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
