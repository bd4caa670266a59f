"""Write constraints.txt: one version of every package that any extra needs, on every machine that is meant.

The resolution is universal (uv): it holds for Python 3.11 to 3.13, and for what a CPU laptop and a Linux GPU machine
need together, so that head, workers and laptop install the same. Lines that only some machines need carry a marker.

    make lock                  newest allowed versions; torch stays where constraints.txt has it
    make lock TORCH=2.13.0     move torch, the one pin that is worth a test on a GPU machine
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
OLDEST_PYTHON = "3.11"
HEADER = """\
# The versions that are tested together: pip install --constraint constraints.txt '.[examples]'
# Made by `make lock` from pyproject.toml: all extras, Python 3.11 to 3.13, with and without a GPU. Not edited by hand.
"""


def read_pin(name: str) -> str | None:
    """Return the version that constraints.txt holds of a package, or None."""
    if not LOCK.exists():
        return None
    found = re.search(rf"^{re.escape(name)}==([^\s;]+)", LOCK.read_text(), re.MULTILINE)
    return found[1] if found else None


def normalise(resolved: str) -> list[str]:
    """Return the pins of a resolution: sorted, without comments and without local versions such as `+cpu`.

    A line that is no pin (an index, a path, an address) is an error: it would tie every machine to this one.
    """
    pins = []
    for raw in resolved.splitlines():
        line = raw.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9.-]*)==([^\s;+]+)(?:\+[^\s;]+)?( ; .+)?", line)
        if match is None:
            raise SystemExit(f"make lock: the resolver answered {line!r}, which is not a pin of the form name==version")
        name, version, marker = match.groups()
        pins.append(f"{name}=={version}{marker or ''}")
    return sorted(pins)


def resolve(torch: str | None) -> str:
    """Ask uv for a universal resolution of pyproject.toml with all extras; return its requirements text."""
    with tempfile.TemporaryDirectory() as scratch:
        extra = []
        if torch is not None:
            pin = Path(scratch) / "torch.txt"
            pin.write_text(f"torch=={torch.split('+')[0]}\n")
            extra = ["--constraint", str(pin)]
        command = [sys.executable, "-m", "uv", "pip", "compile", str(ROOT / "pyproject.toml"), "--all-extras"]
        command += ["--universal", "--python-version", OLDEST_PYTHON, "--fork-strategy", "fewest"]
        command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet", *extra]
        # A folder of wheels on this machine must not decide what others install.
        environment = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS",)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=scratch, timeout=600)
    if done.returncode:
        raise SystemExit("make lock: the versions that pyproject.toml allows do not fit together, see above")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="the version of torch to pin (default: the one pinned now, else the newest)")
    torch = parser.parse_args().torch or read_pin("torch")
    pins = normalise(resolve(torch))
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{LOCK.name}: {len(pins)} pins, torch {read_pin('torch')}. Next: make test, then commit it.")


if __name__ == "__main__":
    main()
