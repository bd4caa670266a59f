"""A machine over SSH: commands, files, ports, and a message for each cause of failure."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.clusters.remote import shell as shells
from launcher.clusters.remote.shell import Shell, destination
from launcher.errors import HostError
from tests.support import servers
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.skipif(bool(servers.why_no_ssh()), reason=servers.why_no_ssh() or "-")


@pytest.fixture(autouse=True)
def sockets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared connections for this test only."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.server(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def shell(server: servers.Server) -> Iterator[Shell]:
    made = Shell(server.words)
    yield made
    made.close()


def test_a_command_runs_on_the_machine(shell: Shell, server: servers.Server) -> None:
    assert shell.run("echo $HOME") == f"{server.home}\n"
    assert shell.run("read word; echo \"<$word>\" 'two  spaces'", stdin="planted\n") == "<planted> two  spaces\n"


def test_neither_script_nor_input_is_in_a_list_of_processes(shell: Shell) -> None:
    shown = shell.run(
        "secret=planted-in-script; cat >/dev/null; cat /proc/[0-9]*/cmdline | tr '\\0' ' '", stdin="planted-input"
    )
    assert "head -c" in shown, "the list was not read"
    assert "planted-" not in shown


def test_commands_share_a_connection(shell: Shell) -> None:
    ask = "echo ${SSH_CONNECTION}"
    assert shell.run(ask) == shell.run(ask)
    before = shell.run(ask)
    shell.close()
    assert shell.run(ask) != before


def test_the_error_of_a_command_has_its_output(shell: Shell) -> None:
    with pytest.raises(HostError, match=r" here .* 3: cannot: full") as caught:
        shell.run("echo cannot: full >&2; exit 3", what="making a thing")
    assert (caught.value.cause, caught.value.host) == ("failed", "here")


def test_a_command_that_takes_too_long(shell: Shell) -> None:
    with pytest.raises(HostError, match=r"^here .* 0\.5 s: a long sleep") as caught:
        shell.run("sleep 60", seconds=0.5, what="a long sleep")
    assert caught.value.cause == "time"


@pytest.mark.parametrize(
    ("change", "cause", "quoted"),
    [
        ("port", "closed", r"\bhere .*Connection refused.*HOST:PORT"),
        ("key", "key", r"\bhere .*Permission denied.*cluster\.ssh_key=FILE"),
        ("forgotten", "unknown", r"\bhere .*`StrictHostKeyChecking accept-new`"),
        ("changed", "changed", r"\bhere .*ssh-keygen -R here\b"),
        ("silent", "dead", r"\bhere .*timed out"),
        ("name", "name", r"\bhere .*no-such-host\.invalid"),
        ("mode", "settings", r"\bhere: .*/config: "),
    ],
)
def test_each_failure_of_a_host_has_its_cause_and_message(
    change: str, cause: str, quoted: str, server: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shells, "CONNECT_SECONDS", 1)
    key, known, place = server.directory / "key", tmp_path / "known", f"127.0.0.1:{server.port}"
    known.write_text(server.known_hosts.read_text())
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens
        if change == "port":
            place = f"127.0.0.1:{taken.getsockname()[1]}"
        elif change == "silent":
            place = f"127.0.0.1:{silent.getsockname()[1]}"
        elif change == "name":
            place = "no-such-host.invalid:22"
        elif change == "key":
            key = servers.make_key(tmp_path / "another")
        elif change == "forgotten":
            known.write_text("")
        elif change == "changed":
            other = servers.make_key(tmp_path / "another").with_suffix(".pub").read_text()
            known.write_text(f"[127.0.0.1]:{server.port} {other}")
        servers.write_client(tmp_path / "config", {"here": place}, key, known)
        if change == "mode":
            (tmp_path / "config").write_text("Nonsense yes\n")
        with pytest.raises(HostError) as caught:
            Shell(["ssh", "-F", str(tmp_path / "config"), "here"]).run("true")
    assert caught.value.cause == cause, str(caught.value)
    assert re.search(quoted, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("under_way", "checks"), [(False, False), (True, False), (True, True)])
def test_a_connection_without_answers_is_dead(
    under_way: bool, checks: bool, server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a check the machine is dead long before the timeout of the connection."""
    for name in ("ALIVE_SECONDS", "ALIVE_COUNT", "CONNECT_SECONDS"):
        monkeypatch.setattr(shells, name, 60 if checks else 1)
    monkeypatch.setattr(shells, "CHECK_SECONDS", 1)
    cut = Shell(server.words)
    cut.close()
    assert cut.run("echo there") == "there\n"
    assert server.process is not None

    def stop() -> None:
        for pid in (server.process.pid, *server.sessions()):  # type: ignore[union-attr]
            os.kill(pid, signal.SIGSTOP)

    later = threading.Timer(1.0 if under_way else 0.0, stop)
    try:
        later.start()
        later.join(0.5)
        with pytest.raises(HostError) as caught:
            cut.run("sleep 1000", seconds=900, checks=checks)
        assert (caught.value.cause, caught.value.host) == ("dead", "here")
    finally:
        later.join()
        for pid in (server.process.pid, *server.sessions()):
            os.kill(pid, signal.SIGCONT)
        cut.close()


# ---- configurations of users ----------------------------------------------------------------------------------------


def configured(server: servers.Server, tmp_path: Path, *options: str, jump: str = "") -> Shell:
    """Return the shell of `here` with more options, behind the jump host `jump` at HOST:PORT."""
    hosts = {"here": f"127.0.0.1:{server.port}"} | ({"jump": jump} if jump else {})
    (tmp_path / "known").write_text(server.known_hosts.read_text())
    servers.write_client(tmp_path / "config", hosts, server.directory / "key", tmp_path / "known", options)
    if jump:
        text = (tmp_path / "config").read_text()
        (tmp_path / "config").write_text(text.replace("Host jump", "  ProxyJump jump\nHost jump", 1))
    return Shell(["ssh", "-F", str(tmp_path / "config"), "here"])


def test_options_for_interactive_sessions_do_not_break_commands_and_tunnels(
    server: servers.Server, tmp_path: Path, web: int
) -> None:
    """The user's own session forwards the port already."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = f"LocalForward {taken.getsockname()[1]} 127.0.0.1:1"
        options = (forward, "ExitOnForwardFailure yes", "RemoteCommand tmux", "RequestTTY force")
        found = configured(server, tmp_path, *options)
        assert found.run("cat", stdin="a\nb\n") == "a\nb\n"
        (tmp_path / "a.py").write_text("x")
        found.send(tmp_path, ["a.py"], str(tmp_path / "copy"))
        with found.tunnel(web) as port:
            assert _ask(port) == b"it is me"
        found.close()


def test_a_shell_that_prints(server: servers.Server, tmp_path: Path, web: int) -> None:
    """Its output is no answer of a command, and the error of rsync quotes it."""
    (server.home / ".bashrc").write_text("echo Welcome to vm2\n")
    found = configured(server, tmp_path)
    try:
        assert found.run("echo there") == "there\n"
        with found.tunnel(web) as port:
            assert _ask(port) == b"it is me"
        (tmp_path / "a.py").write_text("x")
        with pytest.raises(HostError, match=r" here .*'Welcome to vm2'") as caught:
            found.send(tmp_path, ["a.py"], str(tmp_path / "copy"))
        assert caught.value.cause == "shell"
        (server.home / ".bashrc").write_text("echo This account is locked; exit 0\n")
        with pytest.raises(HostError, match="This account is locked"):
            found.run("echo there")
    finally:
        (server.home / ".bashrc").unlink()
        found.close()


def test_a_directory_without_permission_is_not_an_error_of_the_key(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(HostError, match=r"cannot create directory .*/proc/a") as caught:
        shell.send(tmp_path, ["a.py"], "/proc/a")
    assert caught.value.cause == "failed"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("port", r"connect to host 127\.0\.0\.1 port \d+: Connection refused"),
        ("key", r"Permission denied \(publickey"),
        ("forgotten", r"Host key verification failed"),
        ("name", r"Could not resolve hostname no-such-host\.invalid"),
        ("destination", r"open failed: connect failed: Connection refused"),
        ("", ""),
    ],
)
def test_a_failure_of_the_jump_host_is_reported_with_its_own_line(
    change: str, line: str, server: servers.Server, tmp_path: Path
) -> None:
    place = f"127.0.0.1:{server.port}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nothing listens
        closed = taken.getsockname()[1]
        if change == "port":
            place = f"127.0.0.1:{closed}"
        elif change == "name":
            place = "no-such-host.invalid:22"
        found = configured(server, tmp_path, jump=place)
        config = (tmp_path / "config").read_text()
        if change == "key":
            another = servers.make_key(tmp_path / "another")
            config = config.replace("Host jump", f"Host jump\n  IdentityFile {another}")
            config = config.replace(f"  IdentityFile {server.directory / 'key'}\n", "").replace(
                "Host here", f"Host here\n  IdentityFile {server.directory / 'key'}"
            )
        elif change == "forgotten":
            config = config.replace("Host jump", f"Host jump\n  UserKnownHostsFile {tmp_path / 'empty'}")
        elif change == "destination":
            config = config.replace(f"  Port {server.port}\n", f"  Port {closed}\n", 1)
        (tmp_path / "config").write_text(config)
        if not change:
            assert found.run("echo there") == "there\n"
            found.close()
            return
        with pytest.raises(HostError, match=rf"\bjump: .*{line}") as caught:
            found.run("true")
    assert caught.value.cause == "jump"


# ---- files ----------------------------------------------------------------------------------------------------------

HARD = ["plain.py", "a/b/deep.py", "with space.txt", "star*[x]?.txt", "back\\slash", "ümlaut.txt", "-dash"]


def _files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_send_copies_exactly_the_given_files(shell: Shell, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "the re" / "copy"
    for name in [*HARD, "starred-x-y.txt", "secret.env", "runs/1/result.json", "a/other.py"]:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    shell.send(here, HARD, str(there))
    assert _files(there) == set(HARD)

    (here / "plain.py").write_text("changed, and of another length")
    (there / "a" / "__pycache__").mkdir()
    (there / "a" / "__pycache__" / "deep.pyc").write_text("compiled")
    (there / "stranger.py").write_text("not sent by launch")
    shell.send(here, [name for name in HARD if name != "-dash"], str(there))
    assert _files(there) == set(HARD) - {"-dash"} | {"a/__pycache__/deep.pyc"}
    assert (there / "plain.py").read_text() == "changed, and of another length"


THROTTLE = """
import socket, sys, threading, time
there = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def back():
    while block := there.recv(65536):
        sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()
threading.Thread(target=back, daemon=True).start()
while block := sys.stdin.buffer.raw.read(65536):
    there.sendall(block)
    time.sleep(len(block) / float(sys.argv[3]))
"""


def test_a_large_file_resumes_and_reports_progress(
    server: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt is too short for the whole file."""
    monkeypatch.setattr(shells, "PROGRESS_SECONDS", 0.2)
    (tmp_path / "throttle.py").write_text(THROTTLE)
    command = f"ProxyCommand {sys.executable} {tmp_path}/throttle.py %h %p 2e6"
    slow = configured(server, tmp_path, command, "Compression no")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "big.bin").write_bytes(os.urandom(9_000_000))
    lines: list[str] = []
    failures: list[str] = []
    while len(failures) < 8:
        try:
            slow.send(tmp_path / "here", ["big.bin"], str(tmp_path / "copy"), seconds=2.5, progress=lines.append)
            break
        except HostError as error:
            failures.append(error.cause)
            slow.close()
    assert 1 <= len(failures) < 8
    assert set(failures) == {"time"}
    assert (tmp_path / "copy/big.bin").read_bytes() == (tmp_path / "here/big.bin").read_bytes()
    assert any(re.fullmatch(r"\d+ %, \S+/s", line) for line in lines), lines


def test_fetch_copies_a_directory(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("result.json", "log.txt", "big.bin"):
        (tmp_path / "run" / name).write_text(name)
    shell.fetch(f"{tmp_path}/run/", tmp_path / "copy", ["--exclude=*.bin"])
    assert _files(tmp_path / "copy") == {"result.json", "log.txt"}


def test_rsync_is_missing_on_either_machine(
    shell: Shell, server: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "ssh").symlink_to(shutil.which("ssh") or "")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(bare))
        with pytest.raises(HostError) as caught:
            shell.fetch("/nowhere", tmp_path)
        assert caught.value.cause == "no-rsync"
    for program in ("mkdir", "sh"):
        (bare / program).symlink_to(shutil.which(program) or "")
    config = server.directory / "sshd_config"
    before = config.read_text()
    config.write_text(before.replace("SetEnv ", f"SetEnv PATH={bare} "))
    shell.close()
    server.stop()
    server.start()
    try:
        with pytest.raises(HostError, match=r"\brsync, .* here\b") as caught:
            shell.send(tmp_path, ["a"], str(tmp_path / "there"))
        assert caught.value.cause == "rsync"
    finally:
        config.write_text(before)
        server.stop()
        server.start()


# ---- ports ----------------------------------------------------------------------------------------------------------


class _Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"it is me")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[int]:
    serving = servers.HttpServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield serving.server_address[1]
    serving.shutdown()
    serving.server_close()


def _ask(port: int, seconds: float = LIMIT) -> bytes:
    latest = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
                return bytes(answer.read())
        except OSError:
            if time.monotonic() > latest:
                raise
            time.sleep(0.05)


def test_a_tunnel_reconnects_on_the_same_port(shell: Shell, server: servers.Server, web: int) -> None:
    with shell.tunnel(web) as port:
        assert _ask(port) == b"it is me"
        server.stop()
        with pytest.raises(OSError):
            _ask(port, seconds=0)
        server.start()
        assert _ask(port) == b"it is me"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_tunnel_that_cannot_be_opened_reports_the_reason(server: servers.Server, tmp_path: Path) -> None:
    servers.write_client(tmp_path / "config", {"here": "127.0.0.1:1"}, tmp_path / "key", server.known_hosts)
    with (
        pytest.raises(HostError, match="Connection refused"),
        Shell(["ssh", "-F", str(tmp_path / "config"), "here"]).tunnel(1),
    ):
        pass


def test_a_tunnel_ends_with_its_process(shell: Shell, web: int) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # killed without cleanup
        with shell.tunnel(web) as port:
            os.write(writing, f"{port}\n".encode())
            os._exit(9)
    port = int(os.read(reading, 20))
    os.waitpid(child, 0)
    latest = time.monotonic() + 240
    while time.monotonic() < latest:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    raise AssertionError("the tunnel is open after its process has ended")


@pytest.mark.parametrize(
    ("host", "options", "words"),
    [
        ("vm1", {}, "ssh vm1"),
        ("ada@vm1:2222", {"user": "bob"}, "ssh -p 2222 ada@vm1"),
        ("10.0.0.4", {"user": "bob", "key": "/k"}, "ssh -i /k -o IdentitiesOnly=yes bob@10.0.0.4"),
        ("[fe80::1]:22", {"config": "/c"}, "ssh -F /c -p 22 fe80::1"),
        ("fe80::1", {}, "ssh fe80::1"),
    ],
)
def test_the_forms_of_a_host(host: str, options: dict[str, str], words: str) -> None:
    assert " ".join(destination(host, **options)) == words
