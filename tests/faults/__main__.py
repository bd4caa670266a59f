"""Runs the faults, prints the table, and writes it to docs/reliability.md: `python -m tests.faults [WORD…]`.

With words, only faults with one of the words in their name are run, and the other rows of the document are kept. Faults
on several machines need root (see tests/support/vmlab).
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import commit, machine
from tests.faults.harness import Outcome
from tests.faults.table import ROWS, play, undisturbed
from tests.support.vmlab.lab import ROOT, Lab, why_not

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = ("fault", "outcome", "lost steps", "to recover", "world sizes", "weights equal", "commit, date")


def main(words: list[str]) -> int:
    """Return 0 if all rows passed."""
    rows = [row for row in ROWS if not words or any(word in row.fault for word in words)]
    played, failed = {}, 0
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        lab = None
        if any(row.place == "machines" for row in rows):
            if problem := why_not():
                print(problem, file=sys.stderr)
                rows = [row for row in rows if row.place != "machines"]
            else:
                lab = stack.enter_context(Lab(3))
        reference = undisturbed(place / "reference", "cluster=none", "model.seconds=0")
        for number, row in enumerate(rows):
            try:
                outcome = play(row, folder(place, str(number)), lab, reference)
            except AssertionError as error:
                print(f"{row.fault}: {error}", file=sys.stderr)
                outcome, failed = Outcome(row.fault, "FAILED", 0, None, [], equal=False), failed + 1
            played[row.fault] = line_of(outcome.cells())
            print(played[row.fault], flush=True)
            write(played)
    return 1 if failed else 0


def folder(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


def line_of(cells: list[str]) -> str:
    return "| " + " | ".join([*cells, f"{commit()}, {datetime.datetime.now(datetime.UTC).date()}"]) + " |"


def write(played: dict[str, str]) -> None:
    """Write the rows to the document, in the order of the table. Rows that were not run are kept."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines() if line.startswith("| ")}
    lines.update(played)
    table = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    table += [lines[row.fault] for row in ROWS if row.fault in lines]
    caption = f"`python -m tests.faults` on {machine()}:"
    DOCUMENT.write_text(before + "\n".join([BEGIN, caption, "", *table, END]) + after)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
