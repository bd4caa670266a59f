#!/usr/bin/env python3
"""Fakes of sbatch, squeue and scancel, chosen by the name of the link to this file.

$STATE/calls gets one line per call, $STATE/responses defines the answers: `rejects` (option -> Slurm's message),
`states` (lines of squeue, in turn; null: the controller does not answer), `output` and `exit` of the job, and
`interrupt` (the turn of squeue at which the command that follows the job receives Ctrl-C).
"""

import json
import os
import re
import signal
import sys
from pathlib import Path

state = Path(os.environ["STATE"])
responses = json.loads((state / "responses").read_text()) if (state / "responses").exists() else {}
program, words = Path(sys.argv[0]).name, sys.argv[1:]
with (state / "calls").open("a") as calls:
    calls.write(" ".join([program, *words]) + "\n")


def fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(1)


def end_job(status: int) -> None:
    """Write what a job leaves: its output and its exit status."""
    output = re.search(r"--output=(.*)", (state / "script").read_text())
    assert output is not None
    folder = Path(output[1].strip("'")).parent
    if "output" in responses:
        (folder / "output.txt").write_text(responses["output"])
    (folder / "7.0").mkdir(exist_ok=True)
    (folder / "7.0/status.json").write_text(json.dumps({"exit": status}))


if program == "sbatch":
    script = sys.stdin.read()
    for option, message in responses.get("rejects", {}).items():
        if option == "all" or f"#SBATCH --{option}\n" in script:
            fail(message)
    if "--test-only" in words:
        print("sbatch: Job 7 to start at 2026-12-01T00:00:00 using 4 processors on nodes n[1-2]", file=sys.stderr)
    else:
        (state / "script").write_text(script)
        if "exit" in responses:
            end_job(responses["exit"])
        print("7;lab")
elif program == "squeue":
    turn = state / "turn"
    number = int(turn.read_text()) if turn.exists() else 0
    turn.write_text(str(number + 1))
    if number == responses.get("interrupt"):
        os.kill(os.getppid(), signal.SIGINT)
    if (state / "cancelled").exists():
        print("CANCELLED|None")
    elif (state / "signalled").exists():
        print("COMPLETED|None")
    else:
        states = responses.get("states", ["PENDING|Resources"])
        answer = states[min(number, len(states) - 1)]
        if answer is None:
            fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
        elif not answer:
            fail("slurm_load_jobs error: Invalid job id specified")
        print(answer)
elif program == "scancel":
    if "--signal=USR2" in words:
        (state / "signalled").touch()
        end_job(130)
    else:
        (state / "cancelled").touch()
