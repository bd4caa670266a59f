"""Packs the project, launch itself and the specification of a job for a cluster, and checks the cluster's versions."""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import secrets
import shlex
import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.clusters.remote import compare, project
from launcher.clusters.remote.ray_jobs import OVER, Jobs, Unreachable
from launcher.errors import ClusterError, ConfigError
from launcher.formatting import size

# A package that Ray sends and makes importable. It contains all of launch, whose modules import each other.
OWN = "launch_package"
PROBE_SECONDS = 120.0
# Ray starts a job with a shell, and its PATH may have another Python than Ray's, which is the shell's parent process.
_PYTHON = (
    "p=$(sed -n 's|.* \\(/.*\\)/lib/python[^/]*/site-packages/ray/.*|\\1|p' /proc/$PPID/maps 2>/dev/null | head -n 1); "
    'for python in "$p/bin/python" "$(command -v python3)" "$(command -v python)"; '
    'do [ -x "$python" ] && break; done; exec "$python"'
)


def entrypoint(*words: str, python: str | None = None) -> str:
    """Return the shell line of a job that runs Python with these arguments. python: default: the Python of Ray."""
    start = _PYTHON if python is None else f"exec {shlex.quote(python)}"
    return f"{start} {shlex.join(words)}"


def with_own(module: str) -> list[str]:
    """Return the arguments with which Python runs `main` of a module of launch that was sent as `OWN`; see `pack`."""
    code = f"import sys, {OWN}; sys.path.insert(0, {OWN}.__path__[0]); from {module} import main; sys.exit(main())"
    return ["-P", "-c", code]


def new_job() -> str:
    """Return a new, unique id of a job."""
    return f"launch-{secrets.token_hex(6)}"


def environment(names: Sequence[str]) -> dict[str, str]:
    """Return the values of the variables that cluster.env names.

    Raises:
        ConfigError: a variable is not set.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(
            f"cluster.env names {', '.join(missing)}, which is not set in this environment. Export it, or remove it "
            "from cluster.env.",
            key="cluster.env",
        )
    return {name: os.environ[name] for name in names}


def job_spec(
    words: Sequence[str], calling: str | None, config_dir: str | None, environment: dict[str, str], **more: Any
) -> bytes:
    """Return the specification of a job for `launcher.driver`, as JSON.

    It contains values of environment variables, and is only kept in the memory of the head.

    Args:
        words: Hydra overrides.
        calling, config_dir: paths on the head; None: the working directory of the job, and no own configuration.
        more: other fields that the driver reads.
    """
    facts = {"words": list(words), "calling": calling, "config_dir": config_dir, "environment": environment, **more}
    return json.dumps(facts).encode()


@dataclass(frozen=True)
class HeadFacts:
    """What the head of a cluster shares with this machine: the run root, the calling directory, and launch's files."""

    sees_root: bool
    sees_calling: bool
    same_project: bool


def probe(jobs: Jobs, root: Path | None, calling: Path) -> HeadFacts:
    """Compare the head of a cluster with this process by running a small job on it.

    Args:
        root: the run root; an empty directory is created in it for the duration of the job. None: do not check it.

    Raises:
        ClusterError: the versions differ, or the job failed.
    """
    mark = f".probe-{secrets.token_hex(8)}"
    places = [path for path in (root, calling) if path is not None and os.access(path, os.W_OK)]
    look = compare.facts_of_a_node()
    arguments = (str(project.HOME), [str(calling / mark)], [str((root or calling) / mark)])
    code = (
        f"from __future__ import annotations\n{textwrap.dedent(inspect.getsource(look))}\n"
        f"import json\nprint('\\n' + {mark!r} + json.dumps(facts(*{arguments!r})))\n"
    )
    packed = base64.b64encode(code.encode()).decode()
    job = new_job()
    try:
        for place in places:
            (place / mark).mkdir(exist_ok=True)
        jobs.submit(job, entrypoint("-c", f"import base64;exec(base64.b64decode('{packed}').decode())"), {})
        remote = _answer(jobs, job, mark)
    finally:
        for place in places:
            shutil.rmtree(place / mark, ignore_errors=True)
    own = look(str(project.HOME), [], [])
    different = [
        f"{name} is {remote[key] or 'missing'} on its head and {own[key] or 'missing'} here"
        for key, name in compare.COMPARED.items()
        if key != "project" and remote[key] != own[key]
    ]
    if different:
        raise ClusterError(
            f"The cluster at {jobs.url} cannot run this job: {'; '.join(different)}. Install the same versions on both "
            "sides."
        )
    sees_calling = calling in places and not remote["no_modules"]
    return HeadFacts(root in places and not remote["no_run"], sees_calling, remote["project"] == own["project"])


def _answer(jobs: Jobs, job: str, mark: str) -> dict[str, Any]:
    end = time.monotonic() + PROBE_SECONDS
    printed = status = ""
    while time.monotonic() < end:
        try:
            status = jobs.status(job)
            if status in (*OVER, "GONE"):
                printed = jobs.log(job)
                break
        except Unreachable as problem:
            raise ClusterError(f"{jobs.url} stopped answering: {problem}") from None
        time.sleep(0.2)
    found = re.search(rf"^{re.escape(mark)}(.*)$", printed, re.MULTILINE)
    if found is None:
        last = " ".join(line for line in printed.splitlines() if line.strip())[-400:] or jobs.message(job)[:400]
        raise ClusterError(
            f"A test job on the cluster at {jobs.url} did not return a result ({status or 'no status'}): "
            f"{last or 'no output'}. Check with `ray job list` on the head whether the cluster can run jobs."
        )
    answer: dict[str, Any] = json.loads(found[1])
    return answer


@dataclass(frozen=True)
class Package:
    """The result of `pack`.

    Attributes:
        what: a description for the user.
        withheld: a sentence about the files that are not sent, or an empty string.
        config_dir: the directory of the configuration, relative to the calling directory.
        size: bytes.
    """

    what: str
    withheld: str
    config_dir: str | None
    size: int


def pack(calling: Path, config_dir: Path | None, target: Path) -> Package:
    """Copy the calling directory, launch itself and a configuration outside of them to `target`, to be sent by Ray."""
    chosen = project.select(calling)
    place = _copy(calling, chosen.files, target / "calling")
    total = project.size(calling, chosen.files)
    withheld = [chosen.withheld()]
    relative: str | None = None
    if config_dir is not None:
        if config_dir.is_relative_to(calling):
            relative = str(config_dir.relative_to(calling))
        else:
            relative = ".launch-config"
            more = project.select(config_dir)
            _copy(config_dir, more.files, place / relative)
            total += project.size(config_dir, more.files)
            withheld.append(more.withheld())
    own = project.own_files()
    _copy(project.HOME, own, target / OWN)
    (target / OWN / "__init__.py").touch()
    total += project.size(project.HOME, own)
    return Package(f"{calling} and launch itself, {size(total)}", " ".join(filter(None, withheld)), relative, total)


def _copy(source: Path, names: Sequence[str], target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():  # a link to a folder of the directory
            (target / name).symlink_to(os.readlink(source / name))
        else:
            shutil.copy2(source / name, target / name)
    return target
