"""Checks one GPU in one command, without Ray and without a network connection; at most six minutes.

    python benchmarks/gpu.py --json gpu.json            every section on the GPU
    python benchmarks/gpu.py --only right fits          some of them
    python benchmarks/gpu.py --device cpu --tiny        tests the sections on the CPU, in under two minutes
    python benchmarks/gpu.py --page gpu.json            write docs/gpu.md from recorded figures

The sections are files of `benchmarks/gpu_sections/`. Each prints its table when it ends; a failed check or a section
that raises does not prevent the others from running. The exit status is 1 when a check failed. Without a GPU the
tables stay empty.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.figures import ROOT, Figures, environment, table
from benchmarks.gpu_sections.session import Section, Session

SECTIONS = {"right": "correctness", "never waits": "synchronization", "fits": "memory", "fast": "speed"}
QUESTIONS = {
    "right": "Losses, weights and batches on the GPU beside those of the CPU or of plain PyTorch.",
    "never waits": "Synchronizations of the host with the GPU between two logs, counted by PyTorch's profiler.",
    "fits": "The memory that `launch plan` predicts for a worker, beside the peak that training reached.",
    "fast": "Training through `launch` beside a loop written by hand over the same network and data.",
}
PAGE = ROOT / "docs" / "gpu.md"
PAGE_TEXT = """\
# On a GPU

`python benchmarks/gpu.py --page benchmarks/gpu.json` writes this page, from the figures that
`python benchmarks/gpu.py --json benchmarks/gpu.json` recorded. To reproduce them, run the second command on a machine
with a GPU. It needs PyTorch, Hydra and TensorBoard, neither Ray nor a network connection, and takes at most six minutes
on an H100.

{heading}

{sections}
"""
NONE = "No GPU was available, so there are no figures yet."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the sections themselves")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand weights and few steps")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well, for --page")
    parser.add_argument("--page", metavar="JSON", help="write docs/gpu.md from this file and exit")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(Path(options.page).read_text())))
        print(PAGE)
        return 0
    result = measure(options)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    failed = [f"{name}: {check}" for name, found in result["sections"].items() for check in found["failures"]]
    print(f"\n{len(failed)} checks failed" + "".join(f"\n  {line}" for line in failed))
    return 1 if failed else 0


def measure(options: argparse.Namespace) -> Figures:
    """Run the sections; return the content of the JSON file."""
    if options.device == "cpu":
        # Networks this small are fastest on one core, also on a machine with other work.
        os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    usable = options.device == "cpu" or torch.cuda.is_available()
    result: Figures = {"environment": environment(), "device": _device_name(options.device), "sections": {}}
    print(_heading(result), flush=True)
    for name in options.only:
        began = time.perf_counter()
        section = _run(name, options) if usable else Section(name, remarks=[NONE])
        found = {
            "rows": [check.to_row() for check in section.checks],
            "figures": section.figures,
            "remarks": section.remarks,
            "failures": section.failures,
            "seconds": round(time.perf_counter() - began, 1),
        }
        result["sections"][name] = found
        print(f"\n{_section(name, found)}", flush=True)
    return result


def _run(name: str, options: argparse.Namespace) -> Section:
    device = torch.device("cpu" if options.device == "cpu" else "cuda:0")
    section = Section(name)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, section.going_on("the section itself"):
        module: Any = importlib.import_module(f"benchmarks.gpu_sections.{SECTIONS[name]}")
        section = module.run(Session(device, options.tiny, Path(folder)))
    return section


def page(result: Figures) -> str:
    """Return the text of docs/gpu.md: every section with its table, from the JSON file of a run."""
    sections = "\n\n".join(_section(name, result["sections"][name]) for name in SECTIONS if name in result["sections"])
    return PAGE_TEXT.format(heading=_heading(result), sections=sections)


def _heading(result: Figures) -> str:
    here = result["environment"]
    versions = ", ".join(f"{name} {found}" for name, found in here["versions"].items())
    return f"Device: {result['device']}. {here['date']}, commit {here['commit']}; {here['machine']}; {versions}."


def _section(name: str, found: Figures) -> str:
    parts = [f"## {name.capitalize()}", QUESTIONS[name]]
    if found["rows"]:
        parts.append(table(found["rows"]))
    parts += found["remarks"]
    if found["rows"]:
        parts.append(f"The section took {found['seconds']:.0f} s.")
    return "\n\n".join(parts)


def _device_name(device: str) -> str:
    if device == "cpu":
        return "the CPU as a stand-in"
    if not torch.cuda.is_available():
        return "none found"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    sys.exit(main())
