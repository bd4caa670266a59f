"""Commands, files and ports of another machine, by the system's own `ssh` and `rsync`.

    shell = Shell(["ssh", "-p", "2222", "ada@vm1"])
    shell.run("nproc")                             # what it printed; a HostError says what is wrong with the host
    shell.run("cat > token", stdin=token)          # neither script nor input is seen in a list of processes
    shell.send(here, ["a.py", "b/c.py"], "/there") # these files, and no others, lie there afterwards
    with shell.tunnel(8265) as port: ...           # 127.0.0.1:port here is 127.0.0.1:8265 there

OpenSSH reads ~/.ssh/config and asks its agents as it does for its user, so aliases and jump hosts work. Commands to one
host share one connection (ControlMaster), which stays for `PERSIST_SECONDS` after the last. Nothing is ever asked on a
terminal (BatchMode): several hosts are reached at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.clusters.local import ray_session
from launcher.errors import ConfigError, HostError

CONNECT_SECONDS = 10
PERSIST_SECONDS = 120
# A connection on which nothing came back for so long is dead.
ALIVE_SECONDS, ALIVE_COUNT = 5, 3
_SOCKET_BYTES = 103  # the shortest limit of a Unix socket's path among systems
_RECONNECT_SECONDS = 0.5

# What OpenSSH says when it ends with 255 -> what kind of thing is wrong (HostError.cause). The first match counts.
_SAID = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "changed"),
    (r"host key is known|Host key verification failed|authenticity of host", "unknown"),
    (r"Permission denied|Too many authentication failures|No more authentication methods", "key"),
    (r"UNPROTECTED PRIVATE KEY|Bad owner or permissions|Can't open user config|Bad configuration", "settings"),
    (r"Connection refused", "closed"),
    (r"Could not resolve hostname|Name or service not known", "name"),
    (r"timed out|No route to host|Network is unreachable|Host is down|not responding", "dead"),
    (r"command not found|rsync: not found|failed to exec rsync|No such file or directory.*rsync", "rsync"),
)
_SENTENCES = {
    "changed": "The host key of {host} is another one than the one known here. Either the machine was made anew, or "
    "somebody else answers at its address. If you know that it is new, forget the old key: ssh-keygen -R {host}.",
    "unknown": "The host key of {host} is not known here, and nobody can be asked. Connect once by hand and compare "
    "the fingerprint: {command}; or set `StrictHostKeyChecking accept-new` in your SSH configuration.",
    "key": "{host} answers, and does not let this user in ({said}). Load the right key into ssh-agent, or name it with "
    "cluster.ssh_key=FILE and the user with cluster.user=NAME; try by hand: {command}.",
    "settings": "ssh refuses your own settings for {host}: {said}.",
    "closed": "{host} is there, and nothing listens on its SSH port (connection refused). Is sshd running, and is this "
    "its port? Another port is written HOST:PORT.",
    "name": "The name {host} is not known ({said}). Write the host as `ssh` knows it, or its address.",
    "dead": "{host} does not answer ({said}). Is the machine on, and may this network reach it?",
    "lost": "The connection to {host} was lost ({said}). Try again; what was started there may still run.",
    "time": "{host} did not finish within {seconds:g} s: {what}.",
    "rsync": "rsync is not installed on {host}, and files are sent with it. Install it there (Debian and Ubuntu: "
    "apt-get install rsync).",
    "no rsync here": "rsync is not installed on this machine, and files are sent with it. Install it (Debian and "
    "Ubuntu: apt-get install rsync; macOS: brew install rsync).",
    "no ssh here": "ssh is not installed on this machine. Install OpenSSH's client (Debian and Ubuntu: apt-get install "
    "openssh-client).",
    "failed": "On {host} {what} failed with status {status}: {said}",
}


class Shell:
    """One other machine.

    Args:
        words: the ssh command up to and with the destination: `ssh -i KEY ada@vm1`.
        name: what errors call the machine; the destination unless given.

    Raises:
        ConfigError: the destination would be read as an option.
    """

    def __init__(self, words: Sequence[str], name: str | None = None) -> None:
        if words[-1].startswith("-") or "@-" in words[-1]:
            raise ConfigError(f"{words[-1]!r} is no host: ssh would read it as an option. Give the name of a host.")
        self.name = name or words[-1]
        self._plain = list(words)
        alive = ("-o", f"ServerAliveInterval={ALIVE_SECONDS}", "-o", f"ServerAliveCountMax={ALIVE_COUNT}")
        # Before the destination and after the caller's options: of two values ssh takes the first.
        self._options = [*words[:-1], "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *alive]
        self._options += ["-o", "LogLevel=ERROR"]
        self._destination = words[-1]

    def run(self, script: str, *, stdin: str | None = None, seconds: float = 60, what: str = "a command") -> str:
        """Run a script of `sh` there and return what it printed on standard output.

        Args:
            stdin: what the script reads. Like the script itself it is part of no command line.
            what: what is done, for an error: "the start of Ray".

        Raises:
            HostError: no connection; or the script ended with another status than 0, or not in time. The connection
                may be lost while the script goes on.
        """
        code = script.encode()
        # The script comes first on standard input, and what it reads after it.
        words = [*self._shared(), "--", self._destination, f"exec sh -c 'eval \"$(head -c {len(code)})\"'"]
        return self._do(words, code + (stdin or "").encode(), seconds, what)

    def send(self, directory: Path, files: Sequence[str] | None, to: str, *, seconds: float = 600) -> None:
        """Make the directory `to` there hold exactly `files` of a directory here; what else was there goes.

        Compiled Python that lies there stays. Only what differs is sent.

        Args:
            files: relative paths; None for everything.
            to: an absolute path.

        Raises:
            HostError: no connection, no rsync here or there, no space.
        """
        options = ["--delete", "--filter=P __pycache__/", f"--rsync-path=mkdir -p {shlex.quote(to)} && rsync"]
        rules = b""
        if files is not None:
            # Every file and the directories above it, nothing else, and what is not among them is deleted there.
            parents = {str(parent) for file in files for parent in Path(file).parents} - {"."}
            options += ["--delete-excluded", "--from0", "--include-from=-", "--exclude=*"]
            rules = b"".join(f"/{_literal(name)}\0".encode() for name in [*sorted(parents), *files])
        self._rsync(
            [*options, "--", f"{directory}/", f"{self._remote()}:{to}/"], rules, seconds, f"sending files to {to}"
        )

    def fetch(self, remote: str, local: Path, options: Sequence[str] = (), *, seconds: float = 600) -> None:
        """Copy a file, or with a slash at its end the content of a directory, from there; only what differs.

        Args:
            remote: an absolute path there.
            options: further ones of rsync, such as `--exclude=…`.

        Raises:
            HostError: as for `send`.
        """
        words = ["--partial", *options, "--", f"{self._remote()}:{remote}", str(local)]
        self._rsync(words, b"", seconds, f"fetching {remote}")

    @contextlib.contextmanager
    def tunnel(self, port: int, to: str = "127.0.0.1") -> Iterator[int]:
        """Yield a port on this machine's loopback that leads to `port` of `to` as seen from there.

        It has a connection of its own. When that is lost, it is made again on the same port; connections through it
        break meanwhile.

        Raises:
            HostError: no connection at the start.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = probe.getsockname()[1]
        options = ["-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{local}:{to}:{port}"]
        # `cat` ends, and ssh with it, when this process is no more, however it went.
        words = [*self._options, *options, "--", self._destination, "exec cat >/dev/null"]
        tunnel = _Tunnel(self, words, local)
        tunnel.open()
        try:
            yield local
        finally:
            tunnel.close()

    def close(self) -> None:
        """End the shared connection now; the next command makes another."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [*self._shared(), "-O", "exit", "--", self._destination], capture_output=True, timeout=5, check=False
            )

    def failed(self, said: str, status: int = 255, what: str = "a command", seconds: float = 0) -> HostError:
        """Return the error for what ssh (status 255) or a command said on standard error."""
        cause = next((cause for text, cause in _SAID if re.search(text, said)), None) if status == 255 else None
        if status != 255:
            cause = "failed"
        return self._error(cause or "lost", said, status, what, seconds)

    def _error(self, cause: str, said: str = "", status: int = 255, what: str = "", seconds: float = 0) -> HostError:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        # Of ssh the last line says it; of a command what it printed last.
        shown = (lines[-1].rstrip(".\r") if lines else "it said nothing") if cause != "failed" else _tail(lines)
        text = _SENTENCES[cause].format(
            host=self.name, said=shown, status=status, what=what, seconds=seconds, command=shlex.join(self._plain)
        )
        return HostError(text, self.name, cause)

    def _shared(self) -> list[str]:
        """Return the ssh command with the connection that is shared; where it can have no socket, without."""
        path = _socket_path(self._plain)
        if path is None:
            return self._options
        persist = f"ControlPersist={PERSIST_SECONDS}"
        return [*self._options, "-o", "ControlMaster=auto", "-o", f"ControlPath={path}", "-o", persist]

    def _remote(self) -> str:
        """Return the destination for rsync, which wants an IPv6 address in brackets."""
        user, at, host = self._destination.rpartition("@")
        return f"{user}{at}[{host}]" if ":" in host and not host.startswith("[") else self._destination

    def _rsync(self, words: Sequence[str], rules: bytes, seconds: float, what: str) -> None:
        command = ["rsync", "--archive", "--compress", "-s", "-e", shlex.join(self._shared()), *words]
        self._do(command, rules, seconds, what)

    def _do(self, words: Sequence[str], given: bytes, seconds: float, what: str) -> str:
        begun = time.monotonic()
        # Standard error goes to a file: the shared connection stays in the background and may keep it open.
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            except FileNotFoundError:
                raise self._error(f"no {words[0]} here") from None
            with process:
                try:
                    out, _ = process.communicate(given, timeout=seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise self._error("time", what=what, seconds=seconds) from None
                except BaseException:
                    process.kill()
                    raise
            if process.returncode == 0:
                return out.decode(errors="replace")
            errors.seek(0)
            said = errors.read().decode(errors="replace")
        status = process.returncode
        if words[0] == "rsync":  # tells in its own words what ssh told it
            status = 255 if any(re.search(text, said) for text, _ in _SAID) or status in (12, 255) else status
        error = self.failed(said, status, what)
        silent = ALIVE_SECONDS * ALIVE_COUNT
        if error.cause == "lost" and time.monotonic() - begun >= silent:  # ssh says nothing when it gives up
            error = self._error("dead", f"nothing came back for {silent} s")
        raise error


class _Tunnel:
    """One forwarded port, and the thread that keeps it open."""

    def __init__(self, shell: Shell, words: Sequence[str], local: int) -> None:
        self._shell, self._words, self._local = shell, words, local
        self._closing = threading.Event()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep, name="launch-tunnel", daemon=True)

    def open(self) -> None:
        self._start()
        latest = time.monotonic() + 2 * CONNECT_SECONDS
        try:
            while not self._listens():
                assert self._process is not None
                if self._process.poll() is not None:
                    self._errors.seek(0)
                    raise self._shell.failed(self._errors.read().decode(errors="replace"))
                if time.monotonic() > latest:
                    raise self._shell.failed("timed out")
                time.sleep(0.02)
        except BaseException:
            self.close()
            raise
        self._keeper.start()

    def close(self) -> None:
        self._closing.set()
        self._end()
        if self._keeper.ident is not None:
            self._keeper.join()
            self._end()  # the keeper may just have started another
        self._errors.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True
        )

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._local), timeout=1):
            return True
        return False

    def _keep(self) -> None:
        assert self._process is not None
        while not self._closing.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_RECONNECT_SECONDS)
                self._closing.wait(_RECONNECT_SECONDS)
                if not self._closing.is_set():
                    self._end()
                    self._start()


def destination(host: str, user: str | None = None, key: str | None = None, config: str | None = None) -> list[str]:
    """Return the ssh command for a host as a person writes it: `vm1`, `ada@vm1`, `vm1:2222`, `[fe80::1]:2222`.

    Args:
        user: for a host without one of its own.
        key: file of the private key.
        config: file in place of ~/.ssh/config.
    """
    own_user, at, place = host.rpartition("@")
    match = re.fullmatch(r"\[([^\]]+)\](?::(\d+))?|([^:]+)(?::(\d+))?", place)
    name, port = (match[1] or match[3], match[2] or match[4]) if match else (place, None)
    words = ["ssh"]
    words += ["-F", str(Path(config).expanduser())] if config else []
    words += ["-i", str(Path(key).expanduser()), "-o", "IdentitiesOnly=yes"] if key else []
    words += ["-p", port] if port else []
    chosen = own_user if at else user
    return [*words, f"{chosen}@{name}" if chosen else name]


def _socket_path(words: Sequence[str]) -> Path | None:
    directory = ray_session.runtime_directory()
    if directory is None:
        return None
    path = directory / f"ssh-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:12]}"
    return path if len(str(path)) + 17 <= _SOCKET_BYTES else None  # ssh makes it under a longer name first


def _literal(path: str) -> str:
    """Return a path as a pattern of rsync that matches it alone."""
    return re.sub(r"([\[*?\\])", r"\\\1", path) if re.search(r"[\[*?]", path) else path


def _tail(lines: Sequence[str]) -> str:
    return " ".join(lines[-5:])[-600:] or "it said nothing"
