"""The commands that launch runs on a host of a cluster: look, make_environment, start, probe and stop.

This file is sent over SSH and run by the host's own Python (`bootstrap.run_on_host`), version 3.8 or newer. It imports
only the standard library, `reaper` and `ray_seam.settings`, and uses newer syntax only in annotations. A command is a
JSON object on standard input, its answer a JSON object on standard output. Every process that it starts has
`LAUNCH_CLUSTER=<the cluster's directory>` in its environment, by which `stop` finds it.

    <base>/envs/<digest>/     a Python environment; it is usable if it contains the file `complete`
    <base>/<cluster>/         token (readable by this user alone), node.json, scratch (the path of temporary files),
                              ray.log, copies of projects, runs
"""

from __future__ import annotations

import contextlib
import errno
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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.clusters import reaper
from launcher.ray_seam import settings

MARK = "LAUNCH_CLUSTER"
GCS_PORT, DASHBOARD_PORT, AGENT_PORT, CLIENT_PORT = 6379, 8265, 52365, 10001  # or others that are free
START_SECONDS = 90.0
PROBE_SECONDS = 150.0  # also for the start of the head
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
    """A command failed. The message is a sentence without the name of the host."""


def look(command: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about this host: its address, CPUs, GPUs, Python environment, and its node of Ray.

    It changes nothing.
    """
    base, directory = _directories(command)
    address = _address()
    node = _node(directory)
    found: dict[str, Any] = {
        "base": str(base),
        "directory": str(directory),
        "address": address,
        "interface": interface_of(address),
        "node": node,
        "unwritable": _why_unwritable(base),
        "token": _digest(directory / "token"),
        "rsync": shutil.which("rsync") is not None,
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": len(glob.glob("/dev/nvidia[0-9]*")),
        "python": None,
        "versions": {},
    }
    environment = base / "envs" / command.get("digest", "-")
    python = os.path.expanduser(command.get("python") or str(environment / "bin" / "python"))
    if command.get("python") or (environment / "complete").exists():
        known = node.get("versions") if node is not None and node["python"] == python else None
        found["versions"] = known or _versions(python)
        found["python"] = python if found["versions"] else None
    if command.get("nodes") and node is not None and node["head"]:
        found["nodes"] = _nodes(node, directory)
    if node is None and (directory / "node.json").exists():
        found["last_lines"] = _tail(directory / "ray.log")
    return found


def make_environment(command: dict[str, Any]) -> dict[str, Any]:
    """Create the Python environment `digest` unless it exists.

    It has the Python release `version` and the packages of `requirements`, with the versions in `constraints`.
    """
    base, _ = _directories(command)
    place = base / "envs" / command["digest"]
    with _locked(base / "envs" / (command["digest"] + ".lock"), command.get("seconds", 3600.0)):
        if (place / "complete").exists():
            return {"python": str(place / "bin" / "python"), "made": False}
        shutil.rmtree(str(place), ignore_errors=True)
        log = base / "envs" / (command["digest"] + ".log")
        with log.open("w") as sink:
            _run(_venv(command["version"], place), sink, log)
            for name in ("requirements", "constraints"):
                (place / (name + ".txt")).write_text(command[name])
            words = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
            words += ["--constraint", str(place / "constraints.txt"), "--requirement", str(place / "requirements.txt")]
            _run([str(place / "bin" / "python"), *words], sink, log)
        (place / "complete").touch()
    return {"python": str(place / "bin" / "python"), "made": True}


def start(command: dict[str, Any]) -> dict[str, Any]:
    """Start this host's node of Ray with `token`, unless it is running, and return the node.

    The head is returned when nodes can join it; `probe` waits until it is ready for jobs.
    A node that belongs to an earlier start of the head (`generation`) is stopped first.
    """
    base, directory = _directories(command)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    head = command.get("head")  # None on the head itself
    with _locked(directory / "lock", LOCK_SECONDS):
        node = _node(directory)
        generation = None if head is None else head["generation"]
        if node is not None and node["python"] == command["python"] and generation in (None, node["generation"]):
            return node
        _end(directory)
        _write_private(directory / "token", command["token"])
        if head is not None:
            _check_connection(head)
        # Of two clusters that start at the same time, each must see the ports of the other.
        with _locked(base / "start.lock", LOCK_SECONDS):
            return _start_ray(command, directory)


def probe(command: dict[str, Any]) -> dict[str, Any]:
    """Run a job through the Jobs API of the Ray on this host, the head, and return when it has succeeded.

    The node is marked as `probed`.
    """
    _, directory = _directories(command)
    node = _node(directory)
    if node is None:
        raise CommandFailed(f"Ray is not running any more: {_tail(directory / 'ray.log')}")
    headers = {"Authorization": f"Bearer {(directory / 'token').read_text()}", "Content-Type": "application/json"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without the proxies of the environment
    latest = time.monotonic() + PROBE_SECONDS

    def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{node['dashboard']}{path}"
        while True:
            try:
                with opener.open(urllib.request.Request(url, data=data, headers=headers), timeout=10) as answer:
                    found: dict[str, Any] = json.loads(answer.read())
                    return found
            except (OSError, ValueError) as error:
                if _node(directory) is None:
                    raise CommandFailed(f"Ray did not start: {_tail(directory / 'ray.log')}") from None
                if time.monotonic() > latest:
                    text = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else error
                    raise CommandFailed(f"Ray's Jobs API at {url} does not answer: {str(text)[:300]}") from None
            time.sleep(0.2)

    job = ask("/api/jobs/", {"entrypoint": "true"})["submission_id"]
    while True:
        found = ask(f"/api/jobs/{job}")
        if found["status"] not in ("PENDING", "RUNNING"):
            break
        if time.monotonic() > latest:
            raise CommandFailed(f"a test job did not end within {PROBE_SECONDS:g} s ({found['status']})")
        time.sleep(0.1)
    if found["status"] != "SUCCEEDED":
        raise CommandFailed(f"a test job ended as {found['status']}: {str(found.get('message'))[:300]}")
    _write_private(directory / "node.json", json.dumps({**node, "probed": True}))
    return {"job": job}


def stop(command: dict[str, Any]) -> dict[str, Any]:
    """Kill every process of the cluster on this host, and remove its token. Return the processes that are left."""
    _, directory = _directories(command)
    if not directory.is_dir():
        return {"left": [], "ended": 0}
    ended = len(reaper.marked(_mark(directory)))
    # Under the lock: a command that starts Ray at this moment must not start it afterwards.
    with _locked(directory / "lock", LOCK_SECONDS):
        _end(directory)
        left = reaper.marked(_mark(directory))
    return {"left": [f"{pid} ({_command(pid)})" for pid in sorted(left)], "ended": ended}


# ---- Ray ------------------------------------------------------------------------------------------------------------


def _start_ray(command: dict[str, Any], directory: Path) -> dict[str, Any]:
    head, python, address = command.get("head"), command["python"], command["address"]
    scratch = _make_scratch(directory, head)
    node = {"address": address, "head": head is None, "python": python, "scratch": str(scratch)}
    node["versions"] = command.get("versions") or {}
    words = ["--head", "--dashboard-host=127.0.0.1", "--include-dashboard=true", "--no-monitor"]
    if head is None:
        port = _free_port(GCS_PORT)
        node.update(port=port, dashboard=_free_port(DASHBOARD_PORT), generation=os.urandom(6).hex())
        if _succeeds([python, "-c", settings.HAS_CLIENT]):
            # Behind the ports of Ray's workers, 10002 to 19999.
            words += [f"--ray-client-server-port={_free_port(CLIENT_PORT, [CLIENT_PORT, *range(20001, 20101)])}"]
        words += [f"--port={port}", f"--dashboard-port={node['dashboard']}", f"--temp-dir={scratch}/r"]
    else:
        words = [f"--address={endpoint(head['address'], head['port'])}"]
        node.update(port=head["port"], generation=head["generation"])
    words += [f"--node-ip-address={address}", f"--dashboard-agent-listen-port={_free_port(AGENT_PORT)}"]
    words += ["--disable-usage-stats", "--block"]
    log = directory / "ray.log"
    (scratch / "tmp").mkdir(mode=0o700, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [python, *settings.COMMAND, "start", *words],
            cwd=str(directory),
            env=_environment(command, directory, scratch),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        _await_start(process, log, None if head is not None else (address, node["port"]))
        node.update(pid=process.pid, started=reaper._stat(process.pid)[19], since=time.time())
        _write_private(directory / "node.json", json.dumps(node))
    except BaseException:
        _end(directory)
        raise
    return node


def _environment(command: dict[str, Any], directory: Path, scratch: Path) -> dict[str, str]:
    """Return the environment of Ray and of all workers. It has the path of the token's file, not the token."""
    given = dict(os.environ)
    for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        given.pop(name, None)
    interface = interface_of(command["address"])
    if interface is not None:  # gloo and NCCL would resolve the host's name, which may be a loopback address
        given.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    given.update(
        {
            MARK: str(directory),
            "PATH": os.pathsep.join([str(Path(command["python"]).parent), given.get("PATH", os.defpath)]),
            "PYTHONPATH": str(directory / "launch"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(directory / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": f"{scratch}/r",
            "TMPDIR": f"{scratch}/tmp",  # temporary folders of killed processes are removed with it
            **settings.NO_METRICS,
        }
    )
    return given


def _await_start(process: subprocess.Popen[bytes], log: Path, gcs: tuple[str, int] | None) -> None:
    """Wait until Ray has started, or, on the head, until nodes can join it, which is seconds earlier."""
    latest = time.monotonic() + START_SECONDS
    while not (_listens(gcs) if gcs is not None else STARTED in log.read_text(errors="replace")):
        if process.poll() is not None:
            raise CommandFailed(f"Ray did not start: {_tail(log)}")
        if time.monotonic() > latest:
            raise CommandFailed(f"Ray did not start within {START_SECONDS:g} s: {_tail(log)}")
        time.sleep(0.05)


def _listens(place: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(place, timeout=1).close()
        return True
    return False


def _check_connection(head: dict[str, Any]) -> None:
    place = endpoint(head["address"], head["port"])
    try:
        socket.create_connection((head["address"], head["port"]), timeout=10).close()
    except OSError as error:
        raise CommandFailed(
            f"the head's Ray at {place} is unreachable from this host ({error.strerror or error}). The hosts of a "
            "cluster must reach each other on all ports. This is the address at which the head accepted SSH"
        ) from None


def _make_scratch(directory: Path, head: dict[str, Any] | None) -> Path:
    """Create the private directory for Ray's temporary files, which Ray makes readable by all users.

    Its name is short: the path of a Unix socket has at most 107 characters, and Ray adds about 75. Ray uses the path of
    the head on every node.
    """
    if head is None:
        name = "lr-" + hashlib.sha256(str(directory).encode()).hexdigest()[:8]
        path = Path(os.environ.get("TMPDIR", "/tmp")) / name
    else:
        path = Path(head["scratch"])
    _write_private(directory / "scratch", str(path))  # for `_end`
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or path.is_symlink():
        raise CommandFailed(f"{path} exists and is not a private directory of this user. Remove it")
    return path


def _node(directory: Path) -> dict[str, Any] | None:
    """Return the node of Ray that runs on this host; None if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        node: dict[str, Any] = json.loads((directory / "node.json").read_text())
        fields = reaper._stat(node["pid"])
        if fields[0] != "Z" and fields[19] == node["started"]:
            return node
    return None


def _end(directory: Path) -> None:
    """Kill the processes of the cluster on this host, and remove the files of a running node."""
    gone = reaper.end(_mark(directory), grace=2.0)
    for name in ("node.json", "token"):
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()
    scratch = directory / "scratch"
    if gone and scratch.exists():
        shutil.rmtree(scratch.read_text(), ignore_errors=True)
        scratch.unlink()


def _nodes(node: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    """Return the nodes that the head's Ray knows, including the lost ones."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(directory / "token")}
    words = [node["python"], "-c", settings.NODES, endpoint(node["address"], node["port"])]
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=30, check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found
    return []


# ---- Python ---------------------------------------------------------------------------------------------------------


def _venv(version: str, place: Path) -> list[str]:
    """Return the command that creates an environment with this version of Python."""
    test = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    homes = [f"~/.pyenv/versions/{version}*/bin/python3", "/opt/conda/bin/python3", "/anaconda/envs/*/bin/python3"]
    near = [path for home in homes for path in sorted(glob.glob(os.path.expanduser(home)), reverse=True)]
    for python in [f"python{version}", "python3", "python", *near]:
        if _succeeds([python, "-c", test]):
            return [python, "-m", "venv", str(place)]
    uv = shutil.which("uv", path=os.pathsep.join([os.environ.get("PATH", ""), os.path.expanduser("~/.local/bin")]))
    if uv is not None:
        return [uv, "venv", "--seed", "--python", version, str(place)]
    raise CommandFailed(
        f"there is no Python {version} with venv, the version that launch itself uses. Install it (Debian and Ubuntu: "
        f"apt-get install python{version}-venv), install uv, which downloads it, or name an environment with "
        "cluster.python=/PATH/TO/python"
    )


def _run(words: list[str], sink: Any, log: Path) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, check=False)
    if done.returncode == 0:
        return
    # If its index is unreachable, pip continues and reports missing versions in the end.
    lost = re.search(r"Retry\(total=0,.*connection broken by '(.*)': /", log.read_text(errors="replace"))
    if lost is not None:
        why = re.sub(r"<[^>]*>: ", "", lost[1])[-200:]
        raise CommandFailed(
            f"the Python environment could not be created: pip cannot reach its index ({why}). Give the host access to "
            "PyPI, configure a mirror (pip config set global.index-url URL), or name an environment with "
            f"cluster.python=/PATH/TO/python. The log is {log}"
        )
    raise CommandFailed(f"the Python environment could not be created (log: {log}): {_tail(log)}")


def _succeeds(words: list[str]) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(words, capture_output=True, timeout=20, check=False).returncode == 0
    return False


def _versions(python: str) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, timeout=30, check=False)
        found: dict[str, str] = json.loads(done.stdout)
        return found
    return {}


# ---- the machine ----------------------------------------------------------------------------------------------------


def _directories(command: dict[str, Any]) -> tuple[Path, Path]:
    """Return (launch's directory in the home, the cluster's directory in it)."""
    base = Path(os.path.expanduser(command["base"]))
    return base, base / command["cluster"]


def _address() -> str:
    """Return the address of this host on the network of the SSH connection. The other hosts use it, too."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    found = words[2] if len(words) == 4 else ""
    if found.startswith("::ffff:"):  # IPv4 at a server that listens on IPv6
        found = found[len("::ffff:") :]
    # Other hosts reach neither loopback addresses nor, without the name of an interface, link-local ones.
    if found and not found.startswith(("127.", "fe80:")) and found != "::1":
        return found
    for family, other in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))  # nothing is sent
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def endpoint(address: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def interface_of(address: str) -> str | None:
    """Return the network interface with an address; None if there is none, or on systems other than Linux."""
    if sys.platform != "linux":
        return None
    if ":" in address:
        with contextlib.suppress(OSError):
            wanted = socket.inet_pton(socket.AF_INET6, address).hex()
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                if line.split()[0] == wanted:
                    return line.split()[-1]
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24] == socket.inet_aton(address):  # SIOCGIFADDR
                    return name
    return None


def _free_port(first: int, candidates: Iterable[int] | None = None) -> int:
    """Return the first port on which no process listens on any address. candidates: default: 100 from `first` on."""
    for port in candidates or range(first, first + 100):
        if _is_free(socket.AF_INET, "0.0.0.0", port) and _is_free(socket.AF_INET6, "::", port):
            return port
    raise CommandFailed(f"no port is free from {first} on")


def _is_free(family: socket.AddressFamily, address: str, port: int) -> bool:
    try:
        probe = socket.socket(family)
    except OSError:  # this system has no IPv6
        return True
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRNOTAVAIL  # IPv6 is disabled
    return True


def _why_unwritable(directory: Path) -> str:
    """Return the reason why a directory cannot be created or written; empty if it can."""
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if os.access(str(nearest), os.W_OK | os.X_OK):
        return ""
    read_only = os.statvfs(str(nearest)).f_flag & os.ST_RDONLY
    return f"{nearest}: {'Read-only file system' if read_only else 'Permission denied'}"


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
                    raise CommandFailed(f"another command of launch has run for {seconds:g} s (lock: {path})") from None
                time.sleep(0.1)
        yield


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-6:])[-700:] or "no output"
    return "no output"


COMMANDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "look": look,
    "make_environment": make_environment,
    "start": start,
    "probe": probe,
    "stop": stop,
}


def main(command: dict[str, Any]) -> None:
    """Run a command, and print its answer."""
    os.umask(0o077)
    answer: dict[str, Any]
    try:
        answer = {"done": COMMANDS[command["command"]](command)}
    except CommandFailed as problem:
        answer = {"failed": str(problem)}
    except OSError as error:
        answer = {"failed": f"{command['command']} failed: {error.filename or ''} {error.strerror or error}"}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
