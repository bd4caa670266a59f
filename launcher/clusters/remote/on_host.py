"""What launch does on one host of a cluster: look, make a Python environment, start Ray, end all that was started.

This file is sent over SSH and run there (`bootstrap.ask`) by whatever Python 3.8 or newer the host has; it imports the
standard library, `reaper` and `ray_seam.settings` alone, and what newer Pythons allow stands in annotations only. An
order is one JSON object on standard input, its answer another on standard output. Every process that is started carries
`LAUNCH_CLUSTER=<the cluster's directory>` in its environment: that is how it is found again, whatever happened to it.

    <base>/envs/<digest>/     a Python environment; `complete` in it says that it is
    <base>/<cluster>/         token (for this user alone), node.json, ray.log, copies of projects, runs
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.clusters import reaper
from launcher.ray_seam import settings

MARK = "LAUNCH_CLUSTER"
GCS_PORT, DASHBOARD_PORT = 6379, 8265  # or the next ones that are free
START_SECONDS = 90.0
LOCK_SECONDS = 120.0
STARTED = "Ray runtime started."
_VERSIONS = """
import importlib.metadata as m, json, platform
found = {"python": platform.python_version()}
for name in ("ray", "torch"):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""


class CommandFailed(Exception):
    """Something cannot be done here; says what, in a sentence without the host's name."""


def look(order: dict[str, Any]) -> dict[str, Any]:
    """Return what is here. Changes nothing."""
    base, directory = _places(order)
    address = _address()
    node = _node(directory)
    found: dict[str, Any] = {
        "base": str(base),
        "directory": str(directory),
        "address": address,
        "interface": interface_of(address),
        "node": node,
        "token": _digest(directory / "token"),
        "rsync": shutil.which("rsync") is not None,
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": len(glob.glob("/dev/nvidia[0-9]*")),
        "python": None,
        "versions": {},
    }
    python = order.get("python") or str(base / "envs" / order.get("digest", "-") / "bin" / "python")
    if order.get("python") or (base / "envs" / order.get("digest", "-") / "complete").exists():
        found["versions"] = _versions(python)
        found["python"] = python if found["versions"] else None
    if order.get("nodes") and node is not None and node["head"]:
        found["nodes"] = _nodes(node, directory)
    if node is None and (directory / "node.json").exists():
        found["last_words"] = _tail(directory / "ray.log")
    return found


def make_environment(order: dict[str, Any]) -> dict[str, Any]:
    """Make a Python environment unless it is there.

    It gets the Python of `version` and what `requirements` and `constraints` say; `digest` is its name.
    """
    base, _ = _places(order)
    place = base / "envs" / order["digest"]
    with _locked(base / "envs" / (order["digest"] + ".lock"), order.get("seconds", 3600.0)):
        if (place / "complete").exists():
            return {"python": str(place / "bin" / "python"), "made": False}
        shutil.rmtree(str(place), ignore_errors=True)
        log = base / "envs" / (order["digest"] + ".log")
        with log.open("w") as sink:
            _run(_venv(order["version"], place), sink, log)
            for name in ("requirements", "constraints"):
                (place / (name + ".txt")).write_text(order[name])
            words = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
            words += ["--constraint", str(place / "constraints.txt"), "--requirement", str(place / "requirements.txt")]
            _run([str(place / "bin" / "python"), *words], sink, log)
        (place / "complete").touch()
    return {"python": str(place / "bin" / "python"), "made": True}


def start(order: dict[str, Any]) -> dict[str, Any]:
    """Start this host's node of Ray, with `token` on the way, unless it runs already; return it.

    A node that belongs to an earlier start of the head (`generation`) is ended first.
    """
    _, directory = _places(order)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    head = order.get("head")  # None on the head itself
    with _locked(directory / "lock", LOCK_SECONDS):
        node = _node(directory)
        generation = None if head is None else head["generation"]
        if node is not None and node["python"] == order["python"] and generation in (None, node["generation"]):
            return node
        _end(directory)
        _write_private(directory / "token", order["token"])
        if head is not None:
            _check_way(head)
        return _start_ray(order, directory)


def stop(order: dict[str, Any]) -> dict[str, Any]:
    """End every process of the cluster here, and remove its token. Return what is left: nothing, if all is well."""
    _, directory = _places(order)
    if not directory.is_dir():
        return {"left": [], "ended": 0}
    ended = len(reaper.marked(_mark(directory)))
    # One that starts something now would go on after us.
    with _locked(directory / "lock", LOCK_SECONDS):
        _end(directory)
        left = reaper.marked(_mark(directory))
    return {"left": [f"{pid} ({_command(pid)})" for pid in sorted(left)], "ended": ended}


# ---- Ray ------------------------------------------------------------------------------------------------------------


def _start_ray(order: dict[str, Any], directory: Path) -> dict[str, Any]:
    head, python, address = order.get("head"), order["python"], order["address"]
    scratch = _scratch(directory)
    node = {"address": address, "head": head is None, "python": python, "scratch": str(scratch)}
    words = ["--head", "--dashboard-host=127.0.0.1", "--include-dashboard=true", "--no-monitor"]
    if head is None:
        port = _free_port(address, GCS_PORT)
        node.update(port=port, dashboard=_free_port("127.0.0.1", DASHBOARD_PORT), generation=os.urandom(6).hex())
        words += [f"--port={port}", f"--dashboard-port={node['dashboard']}", f"--temp-dir={scratch}/r"]
    else:
        words = [f"--address={head['address']}:{head['port']}"]
        node.update(port=head["port"], generation=head["generation"])
    words += [f"--node-ip-address={address}", "--disable-usage-stats", "--block"]
    log = directory / "ray.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [python, *settings.COMMAND, "start", *words],
            cwd=str(directory),
            env=_environment(order, directory, scratch),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        _await_start(process, log)
        node.update(pid=process.pid, started=reaper._stat(process.pid)[19], since=time.time())
        _write_private(directory / "node.json", json.dumps(node))
    except BaseException:
        _end(directory)
        raise
    return node


def _environment(order: dict[str, Any], directory: Path, scratch: Path) -> dict[str, str]:
    """Return the environment of Ray, and so of all workers. The token is named by its file."""
    given = dict(os.environ)
    for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        given.pop(name, None)
    interface = interface_of(order["address"])
    if interface is not None:  # gloo and NCCL would ask the host's name, which may lead to loopback
        given.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    given.update(
        {
            MARK: str(directory),
            "PATH": os.pathsep.join([str(Path(order["python"]).parent), given.get("PATH", os.defpath)]),
            "PYTHONPATH": str(directory / "launch"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": f"{scratch}/r",
            **settings.NO_METRICS,
        }
    )
    return given


def _await_start(process: subprocess.Popen[bytes], log: Path) -> None:
    latest = time.monotonic() + START_SECONDS
    while STARTED not in log.read_text(errors="replace"):
        if process.poll() is not None:
            raise CommandFailed(f"Ray did not start: {_tail(log)}")
        if time.monotonic() > latest:
            raise CommandFailed(f"Ray had not started after {START_SECONDS:g} s: {_tail(log)}")
        time.sleep(0.05)


def _check_way(head: dict[str, Any]) -> None:
    place = f"{head['address']}:{head['port']}"
    try:
        socket.create_connection((head["address"], head["port"]), timeout=10).close()
    except OSError as error:
        raise CommandFailed(
            f"the head's Ray at {place} cannot be reached from here ({error.strerror or error}). The hosts of a "
            "cluster have to reach each other on all ports, and this is the address at which the head took SSH"
        ) from None


def _scratch(directory: Path) -> Path:
    """Return the directory for Ray's own files, which opens what it makes below to everybody.

    Its name is short: the path of a Unix socket holds 107 characters, and Ray adds about 75.
    """
    name = "lr-" + hashlib.sha256(str(directory).encode()).hexdigest()[:8]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / name
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or path.is_symlink():
        raise CommandFailed(f"{path} is there, and is not a directory of this user alone. Remove it")
    return path


def _node(directory: Path) -> dict[str, Any] | None:
    """Return the node of Ray that lives here."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        node: dict[str, Any] = json.loads((directory / "node.json").read_text())
        fields = reaper._stat(node["pid"])
        if fields[0] != "Z" and fields[19] == node["started"]:
            return node
    return None


def _end(directory: Path) -> None:
    """End what runs here, and remove what only a running node needs."""
    gone = reaper.end(_mark(directory), grace=2.0)
    for name in ("node.json", "token"):
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()
    if gone:
        shutil.rmtree(str(_scratch(directory)), ignore_errors=True)


def _nodes(node: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    """Return what the head's Ray knows of its nodes, the lost ones included."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(directory / "token")}
    words = [node["python"], "-c", settings.NODES, f"{node['address']}:{node['port']}"]
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found
    return []


# ---- Python ---------------------------------------------------------------------------------------------------------


def _venv(version: str, place: Path) -> list[str]:
    """Return the command that makes an environment with this version of Python."""
    test = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    homes = [f"~/.pyenv/versions/{version}*/bin/python3", "/opt/conda/bin/python3", "/anaconda/envs/*/bin/python3"]
    near = [path for home in homes for path in sorted(glob.glob(os.path.expanduser(home)), reverse=True)]
    for python in [f"python{version}", "python3", "python", *near]:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([python, "-c", test], capture_output=True, timeout=20, check=False).returncode == 0:
                return [python, "-m", "venv", str(place)]
    uv = shutil.which("uv", path=os.pathsep.join([os.environ.get("PATH", ""), os.path.expanduser("~/.local/bin")]))
    if uv is not None:
        return [uv, "venv", "--seed", "--python", version, str(place)]
    raise CommandFailed(
        f"there is no Python {version} with venv, the version that runs here (Debian and Ubuntu: apt-get install "
        f"python{version}-venv; or install uv, which brings it). Or name an environment: cluster.python=/PATH/TO/python"
    )


def _run(words: list[str], sink: Any, log: Path) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, check=False)
    if done.returncode == 0:
        return
    # Without its index pip goes on and complains of versions in the end.
    lost = re.search(r"Retry\(total=0,.*connection broken by '(.*)': /", log.read_text(errors="replace"))
    if lost is not None:
        why = re.sub(r"<[^>]*>: ", "", lost[1])[-200:]
        raise CommandFailed(
            f"the Python environment could not be made: pip does not reach its index from there ({why}). Let the host "
            "reach PyPI, set its pip to a mirror (pip config set global.index-url URL), or name an environment that it "
            f"has: cluster.python=/PATH/TO/python. {log} says more"
        )
    raise CommandFailed(f"the Python environment could not be made ({log} says more): {_tail(log)}")


def _versions(python: str) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, timeout=30, check=False)
        found: dict[str, str] = json.loads(done.stdout)
        return found
    return {}


# ---- the machine ----------------------------------------------------------------------------------------------------


def _places(order: dict[str, Any]) -> Any:
    base = Path(os.path.expanduser(order["base"]))
    return base, base / order["cluster"]


def _address() -> str:
    """Return this host's own address on the network over which it was reached; the hosts beside it use it, too."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) == 4 and ":" not in words[2] and not words[2].startswith("127."):
        return words[2]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Return the network interface that carries an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24] == socket.inet_aton(address):  # SIOCGIFADDR
                    return name
    return None


def _free_port(address: str, wanted: int) -> int:
    for port in range(wanted, wanted + 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return port
    raise CommandFailed(f"no port from {wanted} to {wanted + 99} is free on {address}")


def _mark(directory: Path) -> str:
    return f"{MARK}={directory}"


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "?"


def _digest(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    os.replace(str(temporary), str(path))


@contextlib.contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    latest = time.monotonic() + seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > latest:
                    raise CommandFailed(f"another command has been at work here for {seconds:g} s ({path})") from None
                time.sleep(0.1)
        yield


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-6:])[-700:] or "it printed nothing"
    return "it printed nothing"


ORDERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "look": look,
    "make_environment": make_environment,
    "start": start,
    "stop": stop,
}


def main(order: dict[str, Any]) -> None:
    """Do an order, and print its answer."""
    os.umask(0o077)
    answer: dict[str, Any]
    try:
        answer = {"done": ORDERS[order["order"]](order)}
    except CommandFailed as problem:
        answer = {"failed": str(problem)}
    except OSError as error:
        answer = {"failed": f"{order['order']} failed: {error}"}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
