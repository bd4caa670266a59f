"""TensorBoard behind a secret path and a check of the Host header, with the names and columns of `board_data`.

    python -P board_server.py [--launch_open URL] TENSORBOARD'S OPTIONS

Any web page can make a browser send requests to loopback. Such a page does not know the path (`--path_prefix`), and a
host name that an attacker points to loopback (DNS rebinding) is not among the accepted names.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

OPEN = "--launch_open"
_START_SECONDS = 60.0


def is_known(host: str, names: Iterable[str]) -> bool:
    """Return whether a Host header names this server: an IP address, localhost, or one of `names`."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return bool(name) and (name in names or name == "localhost" or name.endswith(".localhost"))


def guarded(application: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """Return a WSGI application that rejects requests whose Host header names another server."""
    known = frozenset(name.lower() for name in names)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        host = str(environ.get("HTTP_HOST", ""))
        if is_known(host.lower(), known):
            return application(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        text = f"{host!r} is not a name of this server. Use its address, or start it with: launch board --host NAME.\n"
        return [text.encode()]

    return answer


def _open_when_ready(url: str) -> None:
    parts = urlsplit(url)
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        try:
            socket.create_connection((parts.hostname or "", parts.port or 80), timeout=1).close()
        except OSError:
            time.sleep(0.1)
            continue
        import webbrowser  # late: it imports subprocess

        webbrowser.open(url)
        return


def main(arguments: list[str]) -> None:
    from absl import app
    from tensorboard import default, main_lib, program
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin

    # Last, and `-P` omits the directory of this file: no module here replaces one of another package.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from launcher.cli.board_data import HParams, NaturalNames

    if arguments[:1] == [OPEN]:
        threading.Thread(target=_open_when_ready, args=(arguments[1],), daemon=True).start()
        arguments = arguments[2:]

    class Server(program.WerkzeugServer):
        def __init__(self, application: Callable[..., Any], flags: Any) -> None:
            names = [socket.gethostname(), socket.getfqdn(), flags.host or ""]
            super().__init__(guarded(application, names), flags)

    class Board(program.TensorBoard):
        def _make_data_provider(self) -> tuple[Any, Any]:
            data, multiplexer = super()._make_data_provider()
            return NaturalNames(data), multiplexer

    main_lib.global_init()
    plugins = [HParams if plugin is HParamsPlugin else plugin for plugin in default.get_plugins()]
    board = Board(plugins=plugins, server_class=Server)
    try:
        app.run(board.main, argv=[sys.argv[0], *arguments], flags_parser=board.configure)
    except base_plugin.FlagsError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
