"""Runs commands, copies files and forwards ports on another machine with the system's `ssh` and `rsync`.

    shell = Shell(["ssh", "-p", "2222", "ada@vm1"])
    shell.run("nproc")                                  # the output of the command; raises HostError
    shell.run("cat > token", stdin=token)               # script and input are not visible in a list of processes
    shell.send(local, ["a.py", "b/c.py"], "/remote")    # /remote contains exactly these files afterwards
    with shell.tunnel(8265) as port: ...                # 127.0.0.1:port is 127.0.0.1:8265 of the machine

OpenSSH reads ~/.ssh/config and uses its agents, so aliases and jump hosts work. Commands to one host share a connection
(ControlMaster), which stays open for `PERSIST_SECONDS` after the last command. ssh never prompts on the terminal, not
even for a jump host, because several hosts are contacted in parallel. Options of the user's configuration for
interactive sessions (`_SESSION`) are overridden.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from launcher.clusters.local import ray_session
from launcher.clusters.remote import host_errors
from launcher.clusters.remote.tunnel import Tunnel, ssh_environment
from launcher.errors import ConfigError, HostError

CONNECT_SECONDS = 10
PERSIST_SECONDS = 120
# A connection is dead after ALIVE_SECONDS * ALIVE_COUNT without an answer.
ALIVE_SECONDS, ALIVE_COUNT = 5, 3
_SOCKET_BYTES = 103  # the shortest limit of a Unix socket's path among systems
IDLE_SECONDS = 60  # without data, after which a transfer has failed
TRANSFER_SECONDS = 24 * 3600.0
PROGRESS_SECONDS = 10.0  # between two reports of a transfer
CHECK_AFTER, CHECK_SECONDS = 3.0, 5  # until a host is asked whether it accepts connections, and the limit of its answer

# Options of the user's configuration that would change or break commands: a terminal, another command, forwarded ports.
_SESSION = ("RequestTTY=no", "RemoteCommand=none", "PermitLocalCommand=no", "ForwardX11=no")


class Shell:
    """A machine that is reached over SSH.

    Args:
        words: the ssh command including the destination: `ssh -i KEY ada@vm1`.
        name: the name of the machine in errors; default: the destination.

    Raises:
        ConfigError: ssh would parse the destination as an option.
    """

    def __init__(self, words: Sequence[str], name: str | None = None) -> None:
        if words[-1].startswith("-") or "@-" in words[-1]:
            raise ConfigError(f"{words[-1]!r} is not a host: ssh would parse it as an option. Use a host name.")
        self.name = name or words[-1]
        self._plain = list(words)
        alive = ("-o", f"ServerAliveInterval={ALIVE_SECONDS}", "-o", f"ServerAliveCountMax={ALIVE_COUNT}")
        # After the options of the caller: if an option is repeated, ssh uses the first value.
        self._options = [*words[:-1], "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *alive]
        self._options += ["-o", "LogLevel=ERROR", *(word for option in _SESSION for word in ("-o", option))]
        self._destination = words[-1]

    def run(
        self,
        script: str,
        *,
        stdin: str | None = None,
        seconds: float = 60,
        what: str = "a command",
        checks: bool = False,
    ) -> str:
        """Run a script of `sh` on the machine and return its standard output.

        Args:
            stdin: the input of the script. Neither is part of a command line.
            what: what the script does, for an error message: "starting Ray".
            checks: if the script takes longer than `CHECK_AFTER`, check whether the machine accepts another connection.
                A silent machine is then reported within 8 s, and otherwise after the timeouts of its connection, 15 s.

        Raises:
            HostError: no connection, an exit status other than 0, or a timeout. If the connection is lost, the script
                may continue to run.
        """
        code = script.encode()
        mark = f"launch-{secrets.token_hex(6)}"
        # Standard input has the script, followed by the script's own input. Startup files of the user's shell may print
        # something before the mark.
        command = f"echo {mark}; exec sh -c 'eval \"$(head -c {len(code)})\"'"
        printed = self._do(
            [*self._shared(), "--", self._destination, command],
            code + (stdin or "").encode(),
            seconds,
            what,
            None,
            checks,
        )
        before, found, output = printed.partition(f"{mark}\n")
        if not found:
            text = f"its shell ran no command, and printed: {before.strip()[-300:] or 'nothing'}"
            raise self._error("failed", text, 0, what)
        return output

    def startup_output(self) -> str:
        """Return the text that the user's shell prints before it runs a command; raises HostError."""
        mark = f"launch-{secrets.token_hex(6)}"
        words = [*self._shared(), "--", self._destination, f"echo {mark}"]
        return self._do(words, b"", 60, "starting a shell").partition(mark)[0].strip()

    def send(
        self,
        directory: Path,
        files: Sequence[str] | None,
        to: str,
        *,
        seconds: float = TRANSFER_SECONDS,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Copy `files` of a local directory to the directory `to`, and delete all other files in it.

        Only differences are sent, and an interrupted transfer resumes within a file. `__pycache__` in `to` is not
        deleted. Links out of the directory are replaced by the files that they refer to.

        Args:
            files: relative paths; None for all files.
            to: an absolute path on the machine.
            progress: called every `PROGRESS_SECONDS` with the percentage and the rate of a transfer.

        Raises:
            HostError: no connection, no rsync on one of the machines, or no space.
        """
        options = ["--delete", "--partial", "--copy-unsafe-links", "--filter=P __pycache__/"]
        options += ["--info=progress2"] if progress is not None and _reports_progress() else []
        options += [f"--rsync-path=mkdir -p {shlex.quote(to)} && rsync"]
        rules = b""
        if files is not None:
            # Include the files and their parent directories; exclude, and so delete, everything else.
            parents = {str(parent) for file in files for parent in Path(file).parents} - {"."}
            options += ["--delete-excluded", "--from0", "--include-from=-", "--exclude=*"]
            rules = b"".join(f"/{_literal(name)}\0".encode() for name in [*sorted(parents), *files])
        words = [*options, "--", f"{directory}/", f"{self._remote()}:{to}/"]
        self._rsync(words, rules, seconds, f"sending files to {to}", progress)

    def fetch(self, remote: str, local: Path, options: Sequence[str] = (), *, seconds: float = 600) -> None:
        """Copy a file of the machine, or the content of a directory if `remote` ends with a slash; only differences.

        Args:
            remote: an absolute path on the machine.
            options: more options of rsync, such as `--exclude=…`.

        Raises:
            HostError: as for `send`.
        """
        words = ["--partial", *options, "--", f"{self._remote()}:{remote}", str(local)]
        self._rsync(words, b"", seconds, f"fetching {remote}")

    @contextlib.contextmanager
    def tunnel(self, port: int, to: str = "127.0.0.1") -> Iterator[int]:
        """Forward a local port to `port` of `to`, as seen from the machine, and yield the local port.

        The tunnel has a connection of its own. If it is lost, the tunnel reconnects on the same local port; open TCP
        connections through it break.

        Raises:
            HostError: the first connection failed.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            local = probe.getsockname()[1]
        # The user's configuration may forward ports that another connection forwards already: that is no failure.
        options = ["-o", "ControlPath=none", "-o", "ExitOnForwardFailure=no", "-L", f"127.0.0.1:{local}:{to}:{port}"]
        # ssh forwards ports before it runs the command. `cat`, and with it ssh, exits when this process exits, even if
        # it is killed.
        words = [*self._options, *options, "--", self._destination, f"echo {Tunnel.READY}; exec cat >/dev/null"]
        tunnel = Tunnel(words, local, self.failed, CONNECT_SECONDS)
        tunnel.open()
        try:
            yield local
        finally:
            tunnel.close()

    def close(self) -> None:
        """Close the shared connection. The next command opens another one."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [*self._shared(), "-O", "exit", "--", self._destination], capture_output=True, timeout=5, check=False
            )

    def failed(self, output: str, status: int = 255, what: str = "a command", seconds: float = 0) -> HostError:
        """Return the error for the standard error of ssh (status 255) or of a command."""
        if status != 255:
            return self._error("failed", output, status, what, seconds)
        proxy = self._proxy() if host_errors.may_be_of_a_proxy(output) else ""
        if proxy:
            return self._error("jump", self._proxy_output(output), status, what, seconds, proxy)
        return self._error(host_errors.cause_of(output), output, status, what, seconds)

    def _error(
        self, cause: str, output: str = "", status: int = 255, what: str = "", seconds: float = 0, proxy: str = ""
    ) -> HostError:
        facts = {"status": status, "what": what, "seconds": seconds, "proxy": proxy, "command": shlex.join(self._plain)}
        return host_errors.host_error(cause, self.name, output, **facts)

    def _is_silent(self) -> bool:
        """Return whether the machine does not answer another connection within `CHECK_SECONDS`."""
        words = [*self._plain[:-1], "-o", f"ConnectTimeout={CHECK_SECONDS}", *self._options[len(self._plain) - 1 :]]
        try:
            done = self._connect_apart(words, 3 * CHECK_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 255 and host_errors.cause_of(done.stderr) == "dead"

    def _proxy_output(self, output: str) -> str:
        """Return the lines of the jump host. With ControlPersist ssh discards them, so connect once without it."""
        if "timed out" in output or host_errors.has_reason(output):
            return output
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return self._connect_apart(self._options, 3 * CONNECT_SECONDS).stderr or output
        return output

    def _connect_apart(self, words: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Connect with the ssh command `words`, without the shared connection and its forwardings, and run `true`."""
        return subprocess.run(
            [*words, "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes", "--", self._destination, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            start_new_session=True,
            env=ssh_environment(),
            check=False,
        )

    def _proxy(self) -> str:
        """Return the jump host or ProxyCommand of the user's configuration in words; empty if there is none."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            words = [*self._plain[:-1], "-G", "--", self._destination]
            printed = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout
            for pattern, text in (
                (r"^proxyjump (?!none$)(.+)$", "its jump host {}"),
                (r"^proxycommand (?!none$)(.+)$", "its ProxyCommand `{}`"),
            ):
                if found := re.search(pattern, printed, re.MULTILINE):
                    return text.format(found[1])
        return ""

    def _shared(self) -> list[str]:
        """Return the ssh command with the shared connection, or without it if there is no place for its socket."""
        options = [*self._options, "-o", "ClearAllForwardings=yes"]
        path = _socket_path(self._plain)
        if path is None:
            return options
        persist = f"ControlPersist={PERSIST_SECONDS}"
        return [*options, "-o", "ControlMaster=auto", "-o", f"ControlPath={path}", "-o", persist]

    def _remote(self) -> str:
        """Return the destination for rsync, which requires brackets around an IPv6 address."""
        user, at, host = self._destination.rpartition("@")
        return f"{user}{at}[{host}]" if ":" in host and not host.startswith("[") else self._destination

    def _rsync(
        self,
        words: Sequence[str],
        rules: bytes,
        seconds: float,
        what: str,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        command = ["rsync", "--archive", "--compress", "-s", f"--timeout={IDLE_SECONDS}"]
        self._do([*command, "-e", shlex.join(self._shared()), *words], rules, seconds, what, progress)

    def _do(
        self,
        words: Sequence[str],
        given: bytes,
        seconds: float,
        what: str,
        progress: Callable[[str], None] | None = None,
        checks: bool = False,
    ) -> str:
        begun = time.monotonic()
        # Files, since the shared connection stays in the background and keeps them open.
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            source.write(given)
            source.seek(0)
            try:
                process = subprocess.Popen(
                    words,
                    stdin=source,
                    stdout=out,
                    stderr=errors,
                    start_new_session=True,  # without a terminal: the ssh of a jump host would prompt on it
                    env=ssh_environment(),
                )
            except FileNotFoundError:
                raise self._error(f"no-{words[0]}") from None
            try:
                while process.poll() is None:
                    left = begun + seconds - time.monotonic()
                    if left <= 0:
                        raise self._error("time", what=what, seconds=seconds)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(left, CHECK_AFTER if checks else PROGRESS_SECONDS))
                    if checks and process.poll() is None:
                        checks = False
                        if self._is_silent() and process.poll() is None:
                            raise self._error("dead", f"no answer for {CHECK_AFTER + CHECK_SECONDS:g} s")
                    if progress is not None and process.poll() is None and (text := _progress(_content(out))):
                        progress(text)
            finally:
                process.kill()
                process.wait()
            if process.returncode == 0:
                return _content(out)
            output = _content(errors)
        status = process.returncode
        if words[0] == "rsync" and status == 30:
            raise self._error("dead", f"no data for {IDLE_SECONDS} s")
        error = self._rsync_error(output, status, what) if words[0] == "rsync" else self.failed(output, status, what)
        silent = ALIVE_SECONDS * ALIVE_COUNT
        if error.cause == "lost" and time.monotonic() - begun >= silent:  # ssh prints nothing after this timeout
            error = self._error("dead", f"no answer for {silent} s")
        raise error

    def _rsync_error(self, output: str, status: int, what: str) -> HostError:
        """Return the error for the standard error of rsync, which contains that of ssh."""
        cause = host_errors.cause_of_rsync(output)
        if cause == "shell":
            with contextlib.suppress(HostError):
                return self._error("shell", repr(self.startup_output()[:200]))
        if cause is not None:
            return self._error(cause, output, status, what)
        return self.failed(output, 255 if host_errors.is_of_ssh(output, status) else status, what)


def destination(host: str, user: str | None = None, key: str | None = None, config: str | None = None) -> list[str]:
    """Return the ssh command for a host in the form of cluster.hosts: `vm1`, `ada@vm1`, `vm1:2222`, `[fe80::1]:2222`.

    Args:
        user: for a host without `USER@`.
        key: file of the private key.
        config: a file to use instead of ~/.ssh/config.
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


def _content(file: IO[bytes]) -> str:
    """Return the content of a file that another process writes to, without moving its position."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _progress(printed: str) -> str:
    """Return the last progress that rsync printed, such as `34 %, 1.20MB/s`; empty if there is none."""
    found = re.findall(r"[\d,.]+[KMGT]?\s+(\d+)%\s+(\S+/s)", printed[-300:])
    return f"{found[-1][0]} %, {found[-1][1]}" if found else ""


@functools.cache
def _reports_progress() -> bool:
    """Return whether the local rsync is 3.1 or newer; that of macOS is not."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        printed = subprocess.run(["rsync", "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
        found = re.search(r"version (\d+)\.(\d+)", printed)
        return found is not None and (int(found[1]), int(found[2])) >= (3, 1)
    return False


def _socket_path(words: Sequence[str]) -> Path | None:
    directory = ray_session.runtime_directory()
    if directory is None:
        return None
    path = directory / f"ssh-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:12]}"
    return path if len(str(path)) + 17 <= _SOCKET_BYTES else None  # ssh first creates it under a longer name


def _literal(path: str) -> str:
    """Return an rsync pattern that matches only this path."""
    return re.sub(r"([\[*?\\])", r"\\\1", path) if re.search(r"[\[*?]", path) else path
