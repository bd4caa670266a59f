"""Hosts with SSH access become a cluster, and stop being one (`cluster=ssh`).

    head = up(job.cluster, tell)       # what is there already is left alone: the second time takes seconds
    head, sentences = status(head)     # asked anew
    down(name, tell)                   # ends every process on every host, and sees that none is left

The first host is the head. Every host is asked for itself and at the same time as the others; one that does not answer
is named and left out, unless it is the head. What happens on a host is told in `on_host`.
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.clusters.remote import project, registry
from launcher.clusters.remote.bootstrap import BASE, Environment, ask, check_versions, everywhere
from launcher.clusters.remote.registry import Head
from launcher.clusters.remote.shell import Shell, destination
from launcher.clusters.ssh.kind import KIND, SshCluster
from launcher.errors import ClusterError, ConfigError, HostError, MachineError
from launcher.formatting import count, size

START_SECONDS = 240.0  # with the wait for another command that is at work there
Tell = Callable[[str], None]


@dataclass
class _Host:
    """One host while it is looked after."""

    name: str
    shell: Shell
    words: list[str]
    touched: bool = False  # something may have been started there, and may live
    leaving: bool = False  # it is no longer among the hosts, and could not be asked to end
    facts: dict[str, Any] = field(default_factory=dict)
    problem: HostError | None = None

    def entry(self) -> dict[str, Any]:
        """Return what is written down of it."""
        facts = {"address": self.facts.get("address", ""), "state": "dead" if self.problem else "lives"}
        kept = {"ssh": self.words, "python": self.facts.get("python"), "touched": self.touched, "leaving": self.leaving}
        why = {"why": str(self.problem)} if self.problem else {}
        return {"name": self.name, **facts, **why, **kept, **{key: self.facts.get(key) for key in ("cpus", "gpus")}}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> _Host:
        facts = {key: entry.get(key) for key in ("address", "python", "cpus", "gpus")}
        shell = Shell(entry["ssh"], entry["name"])
        return cls(entry["name"], shell, entry["ssh"], touched=entry.get("touched", True), facts=facts)


def up(cluster: SshCluster, tell: Tell, calling: Path | None = None) -> Head:
    """Return the cluster that is wanted, with Ray on every host that answers; start what does not run.

    Args:
        tell: is given a line for the user now and then.
        calling: a directory that is sent to every host beside launch itself; None: the current one.

    Raises:
        ConfigError: no hosts are named, and no cluster of this name is known.
        ClusterError: the head cannot be reached or used, or the cluster has another one.
    """
    name = cluster.name or KIND.name
    registry.check_name(name)
    known = next((head for head in registry.all_heads() if head.name == name), None)
    hosts = _wanted(cluster, name, known)
    first = hosts[0]
    python = cluster.python or _given_python(known)
    environment = None if python else Environment.own()
    place: dict[str, Any] = {"cluster": name, "python": python, "digest": environment.digest if environment else "-"}
    try:
        first.facts = ask(first.shell, "look", python, base=BASE, **place)
    except HostError as error:
        raise ClusterError(f"The head of the cluster {name}, the first of its hosts, cannot be used. {error}") from None
    _check_same(name, first.facts, environment)
    # The paths are the same everywhere: those of the head.
    place["base"] = first.facts["base"]
    each = _Each(name, hosts, tell)
    each.do(lambda host: ask(host.shell, "look", python, **place), but=first)
    each.do(lambda host: _have_python(host, python, environment, place, tell))
    for host in each.living():
        host.touched = True
    registry.save(_head(name, hosts, known))  # from here on `down` has something to end, and on which hosts
    _send(each, calling or Path.cwd(), tell)

    token = secrets.token_hex(32)
    node = _start(first, token, place, None, tell)
    rest = [host for host in each.living() if host is not first]
    if any((host.facts["node"] or {}).get("generation") != node["generation"] for host in rest):
        token = first.shell.run(f"cat {shlex.quote(first.facts['directory'])}/token", what="reading the token")
        each.do(lambda host: {"node": _start(host, token, place, node, tell)}, but=first)
    head = _head(name, [*hosts, *_left_behind(hosts, known, tell)], known)
    registry.save(head)
    return head


def status(head: Head) -> tuple[Head, list[str]]:
    """Return the cluster as it is now, and sentences that its user has to know."""
    hosts = [_Host.of(entry) for entry in head.hosts]
    base, _, name = head.directory.rpartition("/")
    answers = everywhere(
        hosts,
        lambda host: ask(host.shell, "look", host.facts["python"], base=base, cluster=name, nodes=True),
    )
    said: list[str] = []
    entries = []
    nodes: list[dict[str, Any]] = []
    for host, answer, entry in zip(hosts, answers, head.hosts, strict=True):
        if isinstance(answer, HostError):
            entries.append({**entry, "state": "dead", "why": str(answer)})
            said.append(str(answer))
            continue
        nodes += answer.get("nodes", [])
        state = "lives" if answer["node"] else "no Ray"
        if not answer["node"]:
            last = f" Its last words: {answer['last_words']}" if answer.get("last_words") else ""
            said.append(f"On {host.name} no Ray runs; `launch up` starts it.{last}")
        entries.append({key: value for key, value in {**entry, "state": state}.items() if key != "why"})
    said += _lost(entries, nodes)
    return replace(head, hosts=entries), said


def written(cluster: SshCluster) -> list[dict[str, Any]]:
    """Return the hosts that `up` would look after, each with what was written down of it. Connects to nothing.

    Raises:
        ConfigError, ClusterError: as `up`, where the hosts are not known or the cluster has another head.
    """
    name = cluster.name or KIND.name
    registry.check_name(name)
    known = next((head for head in registry.all_heads() if head.name == name), None)
    entries = {entry["name"]: entry for entry in known.hosts} if known else {}
    return [entries.get(host.name, {"name": host.name}) for host in _wanted(cluster, name, known)]


def down(name: str, tell: Tell) -> None:
    """End every process of a cluster on every host, see that none is left, and forget it. May be repeated.

    Environments, copies of projects and the files of runs stay on the hosts.

    Raises:
        ClusterError: there is no such cluster.
        MachineError: a host does not answer, or a process is left; what is not done can be repeated.
    """
    head = registry.load(name)
    hosts = [_Host.of(entry) for entry in head.hosts]
    base, _, directory = head.directory.rpartition("/")
    answers = everywhere(hosts, lambda host: _stopped(host, base, directory))
    ended = [host.name for host, answer in zip(hosts, answers, strict=True) if answer is None]
    problems = {host.name: answer for host, answer in zip(hosts, answers, strict=True) if answer is not None}
    # Where nothing was ever started nothing can be left.
    problems = {key: problem for key, problem in problems.items() if _entry(head, key).get("touched", True)}
    for host in hosts:
        host.shell.close()
    if problems:
        registry.save(replace(head, hosts=[entry for entry in head.hosts if entry["name"] in problems]))
        done = f" Nothing is left on {', '.join(ended)}." if ended else ""
        raise MachineError(
            f"The cluster {name} is not all down. {' '.join(map(str, problems.values()))}{done} Repeat `launch down "
            f"{name}` when the rest answers; if it never will, `launch down {name} --forget` forgets it."
        )
    registry.forget(name)
    where = f" on {', '.join(ended)}" if ended else ""
    tell(f"Nothing of the cluster {name} runs{where} any more. Files stay in {head.directory}.")


def copy_directory(calling: Path) -> str:
    """Return where the copy of a calling directory lies on every host, relative to the cluster's directory."""
    return f"projects/{calling.name or 'root'}-{hashlib.sha256(str(calling).encode()).hexdigest()[:6]}"


# ---- the steps ------------------------------------------------------------------------------------------------------


class _Each:
    """Steps that every living host takes at the same time; one that cannot is named and left out of the rest."""

    def __init__(self, cluster: str, hosts: Sequence[_Host], tell: Tell) -> None:
        self._cluster, self._hosts, self._tell = cluster, hosts, tell

    def living(self) -> list[_Host]:
        return [host for host in self._hosts if host.problem is None]

    def do(self, step: Callable[[_Host], dict[str, Any]], but: _Host | None = None) -> None:
        """Take a step and add what it returns to the facts of the host. ClusterError where the head cannot."""
        hosts = [host for host in self.living() if host is not but]
        for host, answer in zip(hosts, everywhere(hosts, step), strict=True):
            if not isinstance(answer, HostError):
                host.facts = {**host.facts, **answer}
            elif host is self._hosts[0]:
                raise ClusterError(f"The head of the cluster {self._cluster} cannot be used. {answer}")
            else:
                host.problem = answer
                self._tell(f"{host.name} is left out: {answer}")


def _wanted(cluster: SshCluster, name: str, known: Head | None) -> list[_Host]:
    """Return the hosts that are asked for, or those that the cluster of this name has."""
    if known is not None and known.kind != KIND.name:
        raise ConfigError(f"There is a cluster {name} of another kind ({known.kind}). Take another cluster.name.")
    if not cluster.hosts:
        if known is None:
            raise ConfigError(
                f"cluster=ssh needs hosts, and no cluster {name} is known whose hosts could be meant. Name them, the "
                "head first: cluster.hosts=[HEAD,USER@HOST:PORT,…]."
            )
        return [_Host.of(entry) for entry in known.hosts if not entry.get("leaving")]
    entries = {entry["name"]: entry for entry in known.hosts} if known else {}
    hosts = []
    for host in cluster.hosts:
        words = destination(host, cluster.user, cluster.ssh_key, cluster.ssh_config)
        entry = entries.get(host, {"touched": False})
        facts = {"address": entry.get("address", "")}  # by which Ray knows one that does not answer any more
        hosts.append(_Host(host, Shell(words, host), words, entry.get("touched", True), facts=facts))
    if known is not None and known.ssh != hosts[0].words:
        raise ClusterError(
            f"The cluster {name} has another head ({' '.join(known.ssh)}). End it first, `launch down {name}`, or give "
            "this one another name: cluster.name=NAME."
        )
    return hosts


def _given_python(known: Head | None) -> str | None:
    """Return the interpreter that cluster.python named when the cluster was made; None for one that launch made."""
    return known.python if known is not None and known.python and "/envs/" not in known.python else None


def _check_same(name: str, facts: dict[str, Any], environment: Environment | None) -> None:
    """Raise ClusterError where the head runs with another Python: whoever starts it anew ends the runs on it."""
    made = f"{facts['base']}/envs/{environment.digest}/bin/python" if environment else facts["python"]
    if facts["node"] is not None and facts["node"]["python"] != made:
        raise ClusterError(
            f"The cluster {name} runs with the Python {facts['node']['python']}, and was asked for with "
            f"{made or 'one that is not there'}: other versions, or another cluster.python. End it first, "
            f"which ends the runs on it (launch down {name}), or take another cluster.name."
        )


def _have_python(
    host: _Host, given: str | None, environment: Environment | None, place: dict[str, Any], tell: Tell
) -> dict[str, Any]:
    """See that the host has an interpreter to run with. Return it."""
    if not host.facts["rsync"]:
        raise host.shell.failed("rsync: command not found")
    python, versions = host.facts["python"], host.facts["versions"]
    if environment is not None and python is None:
        tell(f"{host.name}: making the Python environment {environment.digest}, which takes minutes the first time")
        python = environment.make(host.shell, place["base"], place["cluster"])
    elif given is not None:
        if python is None:
            raise HostError(f"On {host.name} there is no Python {given} (cluster.python).", host.name, "failed")
        check_versions(host.name, given, versions)
    return {"python": python}


def _send(each: _Each, calling: Path, tell: Tell) -> None:
    """Send launch itself and the calling directory to every host, below the cluster's directory."""
    own, chosen = project.own_files(), project.select(calling)
    files = chosen.files
    bytes_in_all = project.size(project.HOME, own) + project.size(calling, files)
    hosts = each.living()
    each_of_them = " each" if len(hosts) > 1 else ""
    tell(
        f"Sending launch and {calling} to {count(len(hosts), 'host')}: {size(bytes_in_all)}{each_of_them}, or what "
        "differs of it"
    )
    if withheld := chosen.withheld():
        tell(withheld)

    def send(host: _Host) -> dict[str, Any]:
        host.shell.send(project.HOME, own, f"{host.facts['directory']}/launch")
        host.shell.send(calling, files, f"{host.facts['directory']}/{copy_directory(calling)}")
        return {}

    each.do(send)


def _start(host: _Host, token: str, place: dict[str, Any], head: dict[str, Any] | None, tell: Tell) -> dict[str, Any]:
    """Have Ray run on a host, as the head or below `head`. Returns its node."""
    facts, node = host.facts, host.facts["node"]
    if node is not None and node["python"] == facts["python"] and head is None:
        return dict(node)
    given = {"base": place["base"], "cluster": place["cluster"], "python": facts["python"]}
    try:
        started = ask(
            host.shell,
            "start",
            facts["python"],
            seconds=START_SECONDS,
            token=token.strip(),
            address=facts["address"],
            head=head,
            **given,
        )
    except HostError as error:
        if head is None:
            raise ClusterError(f"The head of the cluster {place['cluster']} did not come up. {error}") from None
        raise
    if node is None or started["since"] != node["since"]:
        tell(f"{host.name}: Ray runs as {'the head' if head is None else 'a node'} at {started['address']}")
    host.facts["node"] = started
    return started


def _left_behind(hosts: Sequence[_Host], known: Head | None, tell: Tell) -> list[_Host]:
    """End what runs on hosts that the cluster no longer has. Returns those where that was not possible."""
    names = {host.name for host in hosts}
    others = [_Host.of(entry) for entry in known.hosts if entry["name"] not in names] if known else []
    gone = [host for host in others if host.touched]  # in others nothing was ever started
    left = []
    base, _, directory = known.directory.rpartition("/") if known else ("", "", "")
    for host, problem in zip(gone, everywhere(gone, lambda host: _stopped(host, base, directory)), strict=True):
        if problem is None:
            tell(f"{host.name} is no longer among the hosts, and nothing of the cluster runs there any more")
        else:
            host.problem, host.leaving = problem, True
            left.append(host)
            tell(f"{host.name} is no longer among the hosts, and what runs there could not be ended: {problem}")
    return left


def _stopped(host: _Host, base: str, cluster: str) -> HostError | None:
    """End all processes of a cluster on a host. Returns why that is not proven."""
    try:
        left = ask(host.shell, "stop", host.facts["python"], START_SECONDS, base=base, cluster=cluster)["left"]
    except HostError as error:
        return error
    if left:
        return HostError(f"On {host.name} these processes could not be ended: {', '.join(left)}.", host.name, "failed")
    return None


# ---- what is written down -------------------------------------------------------------------------------------------


def _head(name: str, hosts: Sequence[_Host], known: Head | None) -> Head:
    first = hosts[0]
    node = first.facts.get("node") or {}
    created = known.created if known and known.created else datetime.now(UTC).isoformat(timespec="seconds")
    return Head(
        name=name,
        kind=KIND.name,
        ssh=first.words,
        python=first.facts["python"],
        address=f"{first.facts['address']}:{node['port']}" if node else "",
        dashboard=node.get("dashboard", 0),
        directory=first.facts["directory"],
        usd_per_hour=None,  # nobody knows what somebody's own machines cost
        created=created,
        hosts=[host.entry() for host in hosts],
    )


def _entry(head: Head, name: str) -> dict[str, Any]:
    return next(entry for entry in head.hosts if entry["name"] == name)


def _lost(entries: Sequence[dict[str, Any]], nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Say which of the hosts the head's Ray has lost, and when last. Those that the cluster let go are none of them."""
    names = {entry["address"]: entry["name"] for entry in entries if entry.get("address")}
    last: dict[str, dict[str, Any]] = {}
    for node in nodes:
        if (
            node["address"] in names
            and not node["lives"]
            and node["ended"] >= last.get(node["address"], {"ended": 0})["ended"]
        ):
            last[node["address"]] = node
    back = {node["address"] for node in nodes if node["lives"]}
    said = []
    for address, node in sorted(last.items()):
        when = datetime.fromtimestamp(node["ended"]).strftime("%H:%M:%S")
        since = "; it has come back since" if address in back else ""
        why = f" ({' '.join(node['why'].split())[:200]})" if node["why"] else ""
        said.append(f"Ray lost {names[address]} at {when}{why}{since}.")
    return said
