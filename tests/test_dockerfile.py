"""The Dockerfile, without Docker: hadolint checks it, and tests here check rules that hadolint does not have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).parent / "hadolint"
BUILD_TOOLS = r"build-essential|gcc|g\+\+|clang|make|cmake|\S+-dev|python3-venv|python3-pip"


def lint(text: str) -> tuple[int, str]:
    """Run hadolint on the text of a Dockerfile. Return its exit status and its output."""
    done = subprocess.run([HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (NAME, arguments) of every instruction, continuation lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0].upper(), line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, the global ARGs as the first."""
    result: list[list[tuple[str, str]]] = [[]]
    for name, rest in instructions(text):
        if name == "FROM":
            result.append([])
        result[-1].append((name, rest))
    return result


def check(text: str) -> list[str]:
    """Return the violations of rules that hadolint does not have."""
    first, *_, last = stages(text)
    everything = instructions(text)
    origins = [rest.split() for name, rest in everything if name == "FROM"]
    names = {words[-1] for words in origins if len(words) == 3}
    users = [rest for name, rest in last if name == "USER"]
    runs = " ".join(rest for name, rest in last if name == "RUN")
    installs = " ".join(rest for name, rest in everything if name == "RUN" and "pip install" in rest)
    rules = {
        "BASE is an argument with a CUDA runtime image as default": any(
            name == "ARG" and re.fullmatch(r"BASE=nvidia/cuda:\d\S*-runtime-ubuntu\S+", rest) for name, rest in first
        ),
        "every stage starts from BASE or from a stage": {image for image, *_ in origins} <= {"${BASE}"} | names,
        "the image runs as a user that is not root, by number": bool(users)
        and re.fullmatch(r"[1-9]\d*", users[-1]) is not None,
        "no build tool is installed in the image": re.search(rf"\s({BUILD_TOOLS})(\s|$)", runs) is None,
        "dependencies are installed with their hashes": "pip install --require-hashes" in installs
        and len(re.findall(r"pip install(?! --require-hashes| --no-cache-dir --no-deps --no-index)", installs)) == 0,
        "`launch` is the entry point": ("ENTRYPOINT", '["launch"]') in last,
        "the lists of apt are removed": runs.count("apt-get update") == runs.count("rm -rf /var/lib/apt/lists/*"),
    }
    return [rule for rule, holds in rules.items() if not holds]


def test_hadolint_finds_nothing() -> None:
    assert lint(TEXT) == (0, "")


def test_our_own_rules_hold() -> None:
    assert check(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("ARG BASE=", "FROM ubuntu:latest AS extra\nARG BASE=", "DL3007"),
        ("--no-install-recommends", "", "DL3015"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("RUN python3 -m venv", "RUN cd /opt && sudo python3 -m venv", "DL3004"),
        ("USER 10001", "USER root", "DL3002"),
        ("&& rm -rf /var/lib/apt/lists/*", "&& true", "DL3009"),
        ('ENTRYPOINT ["launch"]', "ENTRYPOINT launch", "DL3025"),
        ("WORKDIR /src", "FOLDER /src", "unexpected 'F'"),
    ],
)
def test_hadolint_detects_a_planted_error(old: str, new: str, code: str) -> None:
    assert old in TEXT
    status, output = lint(TEXT.replace(old, new))
    assert status != 0
    assert code in output


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM ${BASE}\n", "FROM ubuntu:24.04\n", "every stage"),
        ("ARG BASE=nvidia/cuda:", "ARG BASE=other/cuda:", "BASE is"),
        ("USER 10001", "USER 0", "not root"),
        ("USER 10001\n", "", "not root"),
        ("ca-certificates git", "ca-certificates gcc git", "no build tool"),
        ("ca-certificates git", "ca-certificates python3-dev git", "no build tool"),
        ("--require-hashes ", "", "hashes"),
        ("pip wheel", "pip install requests && pip wheel", "hashes"),
        ('ENTRYPOINT ["launch"]', 'ENTRYPOINT ["bash"]', "entry point"),
    ],
)
def test_our_own_rules_detect_a_planted_error(old: str, new: str, rule: str) -> None:
    assert old in TEXT
    assert any(rule in broken for broken in check(TEXT.replace(old, new)))


def test_copied_files_are_part_of_the_build_context() -> None:
    """A file that is missing or excluded by .dockerignore would make `docker build` fail."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[ignored.index("*") :][0] == "*"
    sources = [
        source
        for name, rest in instructions(TEXT)
        if name == "COPY" and "--from=" not in rest
        for source in rest.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
