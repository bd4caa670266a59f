"""Errors of hosts over SSH: finds the cause in the output of ssh and rsync, and has a message for each cause."""

from __future__ import annotations

import re
from typing import Any

from launcher.errors import HostError

# Messages of ssh when a jump host or ProxyCommand has failed: a proxied connection has no address.
_OF_PROXY = re.compile(r"UNKNOWN port 65535|stdio forwarding failed|kex_exchange_identification")
# Lines of ssh that follow from another line.
_CONSEQUENCE = re.compile(
    r"UNKNOWN port 65535|kex_exchange_identification|stdio forwarding failed|^\*+$|banner exchange"
)
# Messages of OpenSSH when it exits with status 255, and their HostError.cause. The first match wins.
_CAUSES = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "changed"),
    (r"host key is known|Host key verification failed|authenticity of host", "unknown"),
    (r"Permission denied \([a-z,-]+\)|Too many authentication failures|No more authentication methods", "key"),
    (r"UNPROTECTED PRIVATE KEY|Bad owner or permissions|Can't open user config|Bad configuration", "settings"),
    (r"Connection refused", "closed"),
    (r"Could not resolve hostname|Name or service not known", "name"),
    (r"timed out|No route to host|Network is unreachable|Host is down|not responding", "dead"),
    (r"closed by remote host|Connection (?:reset|closed) by|Broken pipe|connection unexpectedly closed", "lost"),
)
# Messages of rsync, or of the shell that starts it, whatever the exit status.
_RSYNC_CAUSES = (
    (r"command not found|rsync: not found|failed to exec rsync|No such file or directory.*rsync", "rsync"),
    (r"is your shell clean|protocol version mismatch", "shell"),
)
_MESSAGES = {
    "changed": "The host key of {host} has changed. Either the machine was reinstalled, or another machine answers at "
    "its address. If it was reinstalled, remove the old key with ssh-keygen -R {host}.",
    "unknown": "The host key of {host} is unknown, and ssh cannot ask you to confirm it. Connect once by hand and "
    "compare the fingerprint ({command}), or set `StrictHostKeyChecking accept-new` in your SSH configuration.",
    "key": "{host} rejects this user ({output}). Load the right key into ssh-agent, or name it with "
    "cluster.ssh_key=FILE and the user with cluster.user=NAME. Test it with: {command}.",
    "settings": "ssh rejects your settings for {host}: {output}.",
    "closed": "{host} refuses connections to its SSH port ({output}). Check that sshd is running, and the port: write "
    "another port as HOST:PORT.",
    "name": "The host name {host} cannot be resolved ({output}). Use a name that `ssh` knows, or an address.",
    "dead": "{host} does not answer ({output}). Check that the machine is running and reachable from this network.",
    "jump": "{host} cannot be reached through {proxy}: {output}. Test it with: {command}.",
    "lost": "The connection to {host} was lost ({output}). Processes that were started on it may still run.",
    "client": "ssh cannot connect to {host}: {output}. Test it with: {command}.",
    "shell": "The shell of {host} prints {output} to commands, which breaks rsync. Remove this output from its startup "
    "files, such as ~/.bashrc, or print it only in interactive shells.",
    "time": "{host} did not finish within {seconds:g} s: {what}.",
    "rsync": "rsync, which launch uses to send files, is not installed on {host}. Install it (Debian and Ubuntu: "
    "apt-get install rsync).",
    "no-rsync": "rsync, which launch uses to send files, is not installed on this machine. Install it (Debian and "
    "Ubuntu: apt-get install rsync; macOS: brew install rsync).",
    "no-ssh": "ssh is not installed on this machine. Install the OpenSSH client (Debian and Ubuntu: apt-get "
    "install openssh-client).",
    "failed": "{what} failed on {host} with status {status}: {output}",
}


def cause_of(output: str) -> str:
    """Return the `HostError.cause` of an exit of ssh with status 255."""
    cause = next((cause for text, cause in (*_RSYNC_CAUSES, *_CAUSES) if re.search(text, output)), None)
    return cause or ("client" if output.strip() else "lost")


def cause_of_rsync(output: str) -> str | None:
    """Return the cause of a failure of rsync that is not one of ssh; None for another failure."""
    return next((cause for text, cause in _RSYNC_CAUSES if re.search(text, output)), None)


def is_of_ssh(output: str, status: int) -> bool:
    """Return whether a failure of rsync is one of ssh.

    rsync exits with 255 like ssh, and with 12 if the connection was lost or the remote command could not be started.
    """
    return status == 255 or (status == 12 and any(re.search(text, output) for text, _ in _CAUSES[:-1]))


def may_be_of_a_proxy(output: str) -> bool:
    """Return whether the output of ssh is that of a failed jump host or ProxyCommand, if there is one."""
    return bool(_OF_PROXY.search(output))


def has_reason(output: str) -> bool:
    """Return whether the output of ssh has a line that is not the consequence of another."""
    return any(not _CONSEQUENCE.search(line) for line in output.splitlines() if line.strip())


def host_error(cause: str, host: str, output: str, **facts: Any) -> HostError:
    """Return the error for a cause.

    Args:
        output: of ssh, rsync or a command.
        facts: the other fields of the message.
    """
    lines = [line.strip().rstrip("\r") for line in output.splitlines() if line.strip()]
    if cause == "failed":  # a command may need several lines
        shown = " ".join(lines[-5:])[-600:]
    elif cause in ("jump", "client"):
        shown = "; ".join([line.rstrip(".") for line in lines if not _CONSEQUENCE.search(line)] or lines)[-600:]
    else:  # the last line of ssh has the reason
        shown = lines[-1].rstrip(".\r") if lines else ""
    text = _MESSAGES[cause].format(host=host, output=shown or "no output", **facts)
    return HostError(text[0].upper() + text[1:] if cause == "failed" else text, host, cause)
