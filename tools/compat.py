"""Run the smoke suite with the oldest and newest supported releases of Ray and torch; write docs/compatibility.md.

    make compat                                      every pair of the corners, in environments below .compat/
    make compat ARGS="--ray 2.58 --torch 2.14"       one pair, which need not be a corner
    make compat ARGS="--python /path/to/bin/python"  an existing environment that has the tests' requirements

The smoke suite are the tests with the marker `smoke`: the private parts of Ray, training, resuming, a sweep, an elastic
restart and, for root, two machines in network namespaces. A pair that is not run keeps its row: empty, or the last
result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import commit, machine, table  # noqa: E402

RAY, TORCH = ("2.58", "2.60"), ("2.11", "2.13")
PAGE = ROOT / "docs" / "compatibility.md"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's torch for Linux brings several GB of CUDA
COLUMNS = ("Ray", "torch", "versions", "result", "tests", "date", "commit", "machine")
HEADER = """\
# Supported releases of Ray and torch

launch supports the last three minor releases of Ray ({ray}), and torch {torch}. `make compat` runs the
smoke suite with each pair below and writes this page. The smoke suite covers the private parts of Ray, training, a
resume, a sweep, an elastic restart and, for root, two machines in network namespaces. A row without a result was not
run.

"""
Row = dict[str, str]


def read_rows() -> dict[tuple[str, str], Row]:
    """Return the rows of the page, by minor releases of Ray and torch, with an empty one for each corner."""
    rows = {pair: dict.fromkeys(COLUMNS, "") | {"Ray": pair[0], "torch": pair[1]} for pair in product(RAY, TORCH)}
    for line in PAGE.read_text().splitlines() if PAGE.exists() else []:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == len(COLUMNS) and re.match(r"\d", cells[0]):
            rows[cells[0], cells[1]] = dict(zip(COLUMNS, cells, strict=True))
    return rows


def write_rows(rows: dict[tuple[str, str], Row]) -> None:
    ordered = [rows[pair] for pair in sorted(rows)]
    PAGE.write_text(HEADER.format(ray=" to ".join(RAY), torch=" to ".join(TORCH)) + table(ordered) + "\n")


def make_environment(ray: str, torch: str, index: str) -> Path:
    """Return the interpreter of an environment with these minor releases; created on first use."""
    place = ROOT / ".compat" / f"ray-{ray}-torch-{torch}"
    python = place / "bin" / "python"
    if (place / "complete").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["examples"], *extras["test"]]
    wanted = [each for each in wanted if re.split(r"[\[<>=! ]", each)[0] not in ("ray", "torch")]
    pins = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"(?!ray=|torch=)\w", line)
    ]
    (place / "constraints.txt").write_text("\n".join(pins))
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={torch}.*", *(["--index-url", index] if index else [])], check=True)
    words = [f"torch=={torch}.*", f"ray[default,train]=={ray}.*", *wanted]
    subprocess.run([*install, *words, "--constraint", str(place / "constraints.txt")], check=True)
    subprocess.run([*install, "--no-deps", "--editable", str(ROOT)], check=True)
    (place / "complete").touch()
    return python


def run_smoke(python: Path, pytest_words: list[str]) -> Row:
    """Run the smoke suite with an interpreter; return its row."""
    tested = commit()
    ask = (
        "import json, platform, ray, torch; "
        "print(json.dumps([platform.python_version(), ray.__version__, str(torch.__version__)]))"
    )
    asked = subprocess.run([str(python), "-P", "-c", ask], capture_output=True, text=True, check=True)
    own, ray, torch = json.loads(asked.stdout.splitlines()[-1])
    report = ROOT / ".compat" / "report.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    words = ["-m", "pytest", "-m", "smoke", "-p", "no:cacheprovider", f"--junitxml={report}", *pytest_words]
    subprocess.run([str(python), *words], cwd=ROOT, check=False)
    suite = ElementTree.parse(report).getroot()[0]
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    broken = [
        case.attrib["name"] for case in suite.iter("testcase") if any(each.tag in ("failure", "error") for each in case)
    ]
    return {
        "Ray": ".".join(ray.split(".")[:2]),
        "torch": ".".join(torch.split(".")[:2]),
        "versions": f"Ray {ray}, torch {torch}, Python {own}",
        "result": "failed: " + ", ".join(f"`{name}`" for name in broken)
        if failed
        else "passed"
        if passed
        else "none ran",
        "tests": f"{passed} passed, {failed} failed, {count['skipped']} skipped",
        "date": str(datetime.date.today()),
        "commit": tested,
        "machine": machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", nargs="*", default=RAY, help="minor releases of Ray")
    parser.add_argument("--torch", nargs="*", default=TORCH, help="minor releases of torch")
    parser.add_argument("--torch-index", default=CPU_INDEX, help="where torch comes from; empty: pip's own index")
    parser.add_argument("--python", type=Path, help="the interpreter of an existing environment, instead")
    given, pytest_words = parser.parse_known_args()
    failed = False
    for ray, torch in [("", "")] if given.python else product(given.ray, given.torch):
        python = given.python or make_environment(ray, torch, given.torch_index)
        row = run_smoke(python, pytest_words)
        rows = read_rows()  # read after the suite: another one may have run meanwhile
        rows[row["Ray"], row["torch"]] = row
        write_rows(rows)
        print(" | ".join(row.values()))
        failed |= row["result"] != "passed"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
