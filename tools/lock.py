"""Write constraints.txt and locks/: one version of every package of all extras, for every supported machine.

constraints.txt has no hashes, because pip refuses an editable install with them. locks/linux.txt has the hashes of the
packages that images and hosts install, launch and its extra `examples`; the base image of the Dockerfile is pinned by
its digest.

The resolution is universal (uv): it is valid for Python 3.11 to 3.13, and for CPU laptops and Linux GPU machines, so
that head, workers and laptop install the same. Lines that only some machines need have a marker.

    make lock                  newest allowed versions; torch stays where constraints.txt has it
    make lock TORCH=2.13.0     change torch, the one pin that deserves a test on a GPU machine
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
HASHED = ROOT / "locks" / "linux.txt"
DOCKERFILE = ROOT / "Dockerfile"
OLDEST_PYTHON = "3.11"
HEADER = """\
# The versions that are tested together: pip install --constraint constraints.txt '.[examples]' Made by `make lock` from
# pyproject.toml: all extras, Python 3.11 to 3.13, with and without a GPU. Not edited by hand.
"""


HASHED_HEADER = """\
# What images and hosts install, with the hashes that PyPI states: pip install --requirement locks/linux.txt
# Made by `make lock` from pyproject.toml and constraints.txt. Not edited by hand.
--require-hashes
"""


def read_pin(name: str) -> str | None:
    """Return the version of a package in constraints.txt, or None."""
    if not LOCK.exists():
        return None
    found = re.search(rf"^{re.escape(name)}==([^\s;]+)", LOCK.read_text(), re.MULTILINE)
    return found[1] if found else None


def normalise(resolved: str) -> list[str]:
    """Return the pins of a resolution: sorted, without comments and without local versions such as `+cpu`.

    A line that is not a pin (an index, a path, an address) is an error: it would not work on other machines.
    """
    pins = []
    for raw in resolved.splitlines():
        line = raw.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9.-]*)==([^\s;+]+)(?:\+[^\s;]+)?( ; .+)?", line)
        if match is None:
            raise SystemExit(f"make lock: the resolver returned {line!r}, which is not a pin of the form name==version")
        name, version, marker = match.groups()
        pins.append(f"{name}=={version}{marker or ''}")
    return sorted(pins)


def resolve(torch: str | None) -> str:
    """Resolve pyproject.toml with all extras by uv, universally; return its requirements text."""
    with tempfile.TemporaryDirectory() as scratch:
        extra = []
        if torch is not None:
            pin = Path(scratch) / "torch.txt"
            pin.write_text(f"torch=={torch.split('+')[0]}\n")
            extra = ["--constraint", str(pin)]
        return compiled(["--all-extras", *extra])


def compiled(words: list[str]) -> str:
    """Return the output of `uv pip compile` for pyproject.toml."""
    command = [sys.executable, "-m", "uv", "pip", "compile", str(ROOT / "pyproject.toml"), *words]
    command += ["--universal", "--python-version", OLDEST_PYTHON, "--fork-strategy", "fewest"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    # A folder of wheels on this machine must not affect the pins.
    environment = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS",)}
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=scratch, timeout=600)
    if done.returncode:
        raise SystemExit("make lock: the versions that pyproject.toml allows are incompatible, see above")
    return done.stdout


def pin_base(text: str, digest: Callable[[str, str], str]) -> str:
    """Return the text of a Dockerfile with the digest of its base image; digest: of a repository and a tag."""
    found = re.search(r"^ARG BASE=([\w/.-]+):([\w.-]+)(@sha256:[0-9a-f]{64})?$", text, re.MULTILINE)
    if found is None:
        raise SystemExit("make lock: the Dockerfile has no line ARG BASE=REPOSITORY:TAG")
    name, tag = found[1], found[2]
    answer = digest(name, tag)
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", answer):
        raise SystemExit(f"make lock: the registry returned {answer!r} for {name}:{tag}, which is not a digest")
    return text[: found.start()] + f"ARG BASE={name}:{tag}@{answer}" + text[found.end() :]


def digest_on_docker_hub(name: str, tag: str) -> str:
    """Request the digest of a tag from Docker Hub, like its clients. Raises OSError if it is not reachable."""
    address = f"https://auth.docker.io/token?service=registry.docker.io&scope=repository:{name}:pull"
    with urllib.request.urlopen(address, timeout=30) as answer:
        token = json.load(answer)["token"]
    kinds = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json"
    headers = {"Authorization": f"Bearer {token}", "Accept": kinds}
    request = urllib.request.Request(
        f"https://registry-1.docker.io/v2/{name}/manifests/{tag}", headers=headers, method="HEAD"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.headers["Docker-Content-Digest"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="the version of torch to pin (default: the one pinned now, else the newest)")
    torch = parser.parse_args().torch or read_pin("torch")
    pins = normalise(resolve(torch))
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    HASHED.parent.mkdir(exist_ok=True)
    words = ["--extra", "examples", "--constraint", str(LOCK), "--generate-hashes"]
    HASHED.write_text(HASHED_HEADER + compiled(words))
    try:
        DOCKERFILE.write_text(pin_base(DOCKERFILE.read_text(), digest_on_docker_hub))
    except OSError as error:
        print(f"The base image keeps its pin: Docker Hub does not answer ({error}).", file=sys.stderr)
    print(f"{LOCK.name}: {len(pins)} pins, torch {read_pin('torch')}. Next: make test, then commit it.")


if __name__ == "__main__":
    main()
