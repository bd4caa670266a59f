"""Starts and stops a Ray cluster on hosts with SSH access (`cluster=ssh`).

    head = up(job.cluster, report)     # idempotent: starts Ray only on hosts where it is not running
    head, messages = status(head)      # asks every host
    down(name, report)                 # kills every process on every host, and verifies it

The first host is the head. All hosts are used in parallel. A host that does not answer is reported and left out, unless
it is the head. `on_host` has the commands that run on a host.
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher.clusters.base import Report
from launcher.clusters.remote import on_host, project, registry
from launcher.clusters.remote.bootstrap import BASE, Environment, check_versions, everywhere, run_on_host
from launcher.clusters.remote.registry import Head
from launcher.clusters.remote.shell import Shell, destination
from launcher.clusters.ssh.kind import KIND, SshCluster
from launcher.errors import ClusterError, ConfigError, HostError, MachineError
from launcher.formatting import count, size

START_SECONDS = 240.0  # includes the time to wait for another command on the host


@dataclass
class _Host:
    """The state of a host while a command uses it."""

    name: str
    shell: Shell
    words: list[str]
    touched: bool = False  # processes of the cluster may run on it
    leaving: bool = False  # it was removed from cluster.hosts, and its processes could not be stopped
    facts: dict[str, Any] = field(default_factory=dict)
    problem: HostError | None = None

    def entry(self) -> dict[str, Any]:
        """Return the record of this host in `Head.hosts`."""
        state = "dead" if self.problem else "lives"
        why = {"why": str(self.problem)} if self.problem else {}
        return {
            "name": self.name,
            "address": self.facts.get("address", ""),
            "state": state,
            **why,
            "ssh": self.words,
            "touched": self.touched,
            "leaving": self.leaving,
            **{key: self.facts.get(key) for key in ("base", "python", "cpus", "gpus")},
        }

    @property
    def place(self) -> dict[str, Any]:
        """Return launch's directory on this host, for commands of `on_host`. Homes of hosts may differ."""
        return {"base": self.facts.get("base") or BASE}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> _Host:
        facts = {key: entry.get(key) for key in ("address", "base", "python", "cpus", "gpus")}
        shell = Shell(entry["ssh"], entry["name"])
        return cls(entry["name"], shell, entry["ssh"], touched=entry.get("touched", True), facts=facts)


def up(cluster: SshCluster, report: Report, calling: Path | None = None) -> Head:
    """Start Ray on every host that answers, unless it is running, and return the cluster.

    Args:
        report: called with lines for the user.
        calling: the directory that is sent to every host besides launch itself; None: the current directory.

    Raises:
        ConfigError: no hosts are named, and there is no cluster with this name.
        ClusterError: the head is unreachable or cannot be used, or the cluster has another head.
    """
    name = cluster.name or KIND.name
    registry.check_name(name)
    project.check(calling or Path.cwd())
    known = next((head for head in registry.all_heads() if head.name == name), None)
    hosts = _requested_hosts(cluster, name, known)
    first = hosts[0]
    python = cluster.python or _recorded_python(known)
    environment = None if python else Environment.own()
    digest = environment.digest if environment else "-"

    def look(host: _Host) -> dict[str, Any]:
        own = cluster.python or (python and (host.facts.get("python") or python))
        return run_on_host(host.shell, "look", own, base=BASE, cluster=name, python=own, digest=digest)

    each = _Hosts(name, hosts, report)
    each.do(look)
    _check_same_python(name, first.facts, environment)
    if len(hosts) > 1 and first.facts["address"].startswith(("127.", "::1")):
        raise ClusterError(
            f"The head {first.name} has only the address {first.facts['address']}, which other hosts cannot reach. "
            "Connect it to their network, and name it by an address of that network in cluster.hosts."
        )
    each.do(_check_writable)
    each.do(lambda host: _ensure_python(host, python, environment, name, report))
    for host in each.usable():
        host.touched = True
    registry.save(_head(name, hosts, known))  # from now on `down` knows the hosts
    with ThreadPoolExecutor(max_workers=1) as pool:
        starting = pool.submit(_start, first, secrets.token_hex(32), name, None, report)
        _send(each, calling or Path.cwd(), report)
        node = starting.result()
        probing = None if node.get("probed") else pool.submit(_probe, first, name)
        rest = [host for host in each.usable() if host is not first]
        if any((host.facts["node"] or {}).get("generation") != node["generation"] for host in rest):
            token = first.shell.run(f"cat {shlex.quote(first.facts['directory'])}/token", what="reading the token")
            each.do(lambda host: {"node": _start(host, token, name, node, report)}, but=first)
        head = _head(name, [*hosts, *_stop_removed(hosts, known, report)], known)
        registry.save(head)
        if probing is not None:
            probing.result()
    return head


def status(head: Head) -> tuple[Head, list[str]]:
    """Ask every host for its state, and return the updated cluster and messages for the user."""
    hosts = [_Host.of(entry) for entry in head.hosts]
    answers = everywhere(
        hosts,
        lambda host: run_on_host(
            host.shell, "look", host.facts["python"], checks=True, cluster=head.name, nodes=True, **host.place
        ),
    )
    messages: list[str] = []
    entries = []
    nodes: list[dict[str, Any]] = []
    for host, answer, entry in zip(hosts, answers, head.hosts, strict=True):
        if isinstance(answer, HostError):
            entries.append({**entry, "state": "dead", "why": str(answer)})
            messages.append(str(answer))
            continue
        nodes += answer.get("nodes", [])
        state = "lives" if answer["node"] else "no Ray"
        if not answer["node"]:
            last = f" The last lines of its log: {answer['last_lines']}" if answer.get("last_lines") else ""
            messages.append(f"Ray is not running on {host.name}. `launch up` starts it.{last}")
        entries.append({key: value for key, value in {**entry, "state": state}.items() if key != "why"})
    messages += _lost(entries, nodes)
    return replace(head, hosts=entries), messages


def recorded_hosts(cluster: SshCluster) -> list[dict[str, Any]]:
    """Return the hosts that `up` would use, with the facts that were recorded about them. Opens no connection.

    Raises:
        ConfigError, ClusterError: as `up`, if no hosts are known or the cluster has another head.
    """
    name = cluster.name or KIND.name
    registry.check_name(name)
    known = next((head for head in registry.all_heads() if head.name == name), None)
    entries = {entry["name"]: entry for entry in known.hosts} if known else {}
    return [entries.get(host.name, {"name": host.name}) for host in _requested_hosts(cluster, name, known)]


def down(name: str, report: Report) -> None:
    """Kill every process of a cluster on every host, verify that none is left, and remove its record.

    Environments, copies of projects and the files of runs stay on the hosts.

    Raises:
        ClusterError: there is no such cluster.
        MachineError: a host does not answer, or a process is left. `down` can be repeated.
    """
    head = registry.load(name)
    hosts = [_Host.of(entry) for entry in head.hosts]
    answers = everywhere(hosts, lambda host: _stop(host, name))
    ended = [host.name for host, answer in zip(hosts, answers, strict=True) if answer is None]
    problems = {host.name: answer for host, answer in zip(hosts, answers, strict=True) if answer is not None}
    # No process can be left on a host where none was started.
    problems = {key: problem for key, problem in problems.items() if _entry(head, key).get("touched", True)}
    for host in hosts:
        host.shell.close()
    if problems:
        registry.save(replace(head, hosts=[entry for entry in head.hosts if entry["name"] in problems]))
        done = f" Nothing is left on {', '.join(ended)}." if ended else ""
        raise MachineError(
            f"The cluster {name} is not completely down. {' '.join(map(str, problems.values()))}{done} Repeat `launch "
            f"down {name}` when the other hosts answer. If they never will, `launch down {name} --forget` removes the "
            "record of the cluster."
        )
    registry.forget(name)
    where = f" on {', '.join(ended)}" if ended else ""
    report(f"No process of the cluster {name} is left{where}. Files stay in {head.directory}.")


def copy_directory(calling: Path) -> str:
    """Return the directory on every host for the copy of a calling directory, relative to the cluster's directory."""
    return f"projects/{calling.name or 'root'}-{hashlib.sha256(str(calling).encode()).hexdigest()[:6]}"


# ---- the steps ------------------------------------------------------------------------------------------------------


class _Hosts:
    """Runs steps on all hosts in parallel. A host on which a step fails is reported and left out of later steps."""

    def __init__(self, cluster: str, hosts: Sequence[_Host], report: Report) -> None:
        self._cluster, self._hosts, self._report = cluster, hosts, report

    def usable(self) -> list[_Host]:
        return [host for host in self._hosts if host.problem is None]

    def do(self, step: Callable[[_Host], dict[str, Any]], but: _Host | None = None) -> None:
        """Run a step on all usable hosts, and add its result to the facts of each. Raises ClusterError for the head."""
        hosts = [host for host in self.usable() if host is not but]
        for host, answer in zip(hosts, everywhere(hosts, step), strict=True):
            if not isinstance(answer, HostError):
                host.facts = {**host.facts, **answer}
            elif host is self._hosts[0]:
                raise ClusterError(f"The head of the cluster {self._cluster} (its first host) cannot be used. {answer}")
            else:
                host.problem = answer
                self._report(f"{host.name} is left out: {answer}")


def _requested_hosts(cluster: SshCluster, name: str, known: Head | None) -> list[_Host]:
    """Return the hosts in the configuration, or else those of the cluster with this name."""
    if known is not None and known.kind != KIND.name:
        raise ConfigError(
            f"The cluster {name} is of another kind ({known.kind}). Choose another cluster.name.", key="cluster.name"
        )
    if not cluster.hosts:
        if known is None:
            raise ConfigError(
                f"cluster=ssh needs hosts, and there is no cluster {name} from an earlier command. Name the hosts, the "
                "head first: cluster.hosts=[HEAD,USER@HOST:PORT,…].",
                key="cluster.hosts",
            )
        return [_Host.of(entry) for entry in known.hosts if not entry.get("leaving")]
    entries = {entry["name"]: entry for entry in known.hosts} if known else {}
    hosts = []
    for host in cluster.hosts:
        words = destination(host, cluster.user, cluster.ssh_key, cluster.ssh_config)
        entry = entries.get(host, {"touched": False})
        # The address is Ray's name for the host, if it does not answer now.
        facts = {"address": entry.get("address", ""), "python": entry.get("python")}
        hosts.append(_Host(host, Shell(words, host), words, entry.get("touched", True), facts=facts))
    if known is not None and known.ssh != hosts[0].words:
        raise ClusterError(
            f"The cluster {name} has another head ({' '.join(known.ssh)}). Stop it first with `launch down {name}`, or "
            "choose another name with cluster.name=NAME."
        )
    return hosts


def _recorded_python(known: Head | None) -> str | None:
    """Return the cluster.python of the command that created the cluster; None if launch created the environment."""
    return known.python if known is not None and known.python and "/envs/" not in known.python else None


def _check_same_python(name: str, facts: dict[str, Any], environment: Environment | None) -> None:
    """Raise ClusterError if the head runs with another Python, since a restart would kill the runs on the cluster."""
    made = f"{facts['base']}/envs/{environment.digest}/bin/python" if environment else facts["python"]
    if facts["node"] is not None and facts["node"]["python"] != made:
        raise ClusterError(
            f"The cluster {name} runs with the Python {facts['node']['python']}, but this command needs "
            f"{made or 'one that does not exist'}: other versions, or another cluster.python. Stop the cluster and its "
            f"runs first (launch down {name}), or choose another cluster.name."
        )


def _check_writable(host: _Host) -> dict[str, Any]:
    """Raise HostError if the host's user cannot write launch's directory."""
    if reason := host.facts.get("unwritable"):
        raise HostError(
            f"{host.name} cannot write {host.facts['base']} ({reason}). Use a user whose home directory is writable.",
            host.name,
            "failed",
        )
    return {}


def _probe(head: _Host, cluster: str) -> None:
    """Raise ClusterError unless the head's Ray runs a test job."""
    try:
        run_on_host(head.shell, "probe", head.facts["python"], START_SECONDS, cluster=cluster, **head.place)
    except HostError as error:
        raise ClusterError(f"The cluster {cluster} was started, but cannot run jobs. {error}") from None


def _ensure_python(
    host: _Host, given: str | None, environment: Environment | None, cluster: str, report: Report
) -> dict[str, Any]:
    """Create the host's Python environment if it is missing, and return its interpreter."""
    if not host.facts["rsync"]:
        raise host.shell.failed("rsync: command not found")
    python, versions = host.facts["python"], host.facts["versions"]
    if environment is not None and python is None:
        report(f"{host.name}: creating the Python environment {environment.digest}, which takes minutes the first time")
        python = environment.create(host.shell, host.facts["base"], cluster)
    elif given is not None:
        if python is None:
            raise HostError(f"{host.name} has no Python {given} (cluster.python).", host.name, "failed")
        check_versions(host.name, given, versions)
    return {"python": python}


def _send(each: _Hosts, calling: Path, report: Report) -> None:
    """Send launch itself and the calling directory to the cluster's directory on every host."""
    own, chosen = project.own_files(), project.select(calling)
    files = chosen.files
    bytes_in_all = project.size(project.HOME, own) + project.size(calling, files)
    hosts = each.usable()
    each_of_them = " each" if len(hosts) > 1 else ""
    report(
        f"Sending launch and {calling} to {count(len(hosts), 'host')}: {size(bytes_in_all)}{each_of_them}, less the "
        "files that are up to date"
    )
    if withheld := chosen.withheld():
        report(withheld)

    def send(host: _Host) -> dict[str, Any]:
        to = f"{host.facts['directory']}/{copy_directory(calling)}"
        with ThreadPoolExecutor(max_workers=1) as pool:
            sending = pool.submit(host.shell.send, project.HOME, own, f"{host.facts['directory']}/launch")
            host.shell.send(calling, files, to, progress=lambda text: report(f"{host.name}: sent {text}"))
            sending.result()
        return {}

    each.do(send)


def _start(host: _Host, token: str, cluster: str, head: dict[str, Any] | None, report: Report) -> dict[str, Any]:
    """Start Ray on a host, as the head or as a node of `head`, unless it is running, and return its node."""
    facts, node = host.facts, host.facts["node"]
    if node is not None and node["python"] == facts["python"] and head is None:
        return dict(node)
    given = {"cluster": cluster, "python": facts["python"], "versions": facts["versions"], **host.place}
    try:
        started = run_on_host(
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
            raise ClusterError(f"The head of the cluster {cluster} did not start. {error}") from None
        raise
    if node is None or started["since"] != node["since"]:
        report(f"{host.name}: Ray runs as {'the head' if head is None else 'a node'} at {started['address']}")
    host.facts["node"] = started
    return started


def _stop_removed(hosts: Sequence[_Host], known: Head | None, report: Report) -> list[_Host]:
    """Stop Ray on hosts that were removed from cluster.hosts. Returns those where this failed."""
    names = {host.name for host in hosts}
    others = [_Host.of(entry) for entry in known.hosts if entry["name"] not in names] if known else []
    gone = [host for host in others if host.touched]
    left = []
    cluster = known.name if known else ""
    for host, problem in zip(gone, everywhere(gone, lambda host: _stop(host, cluster)), strict=True):
        if problem is None:
            report(f"{host.name} was removed from the cluster, and none of its processes is left on it")
        else:
            host.problem, host.leaving = problem, True
            left.append(host)
            report(f"{host.name} was removed from the cluster, but its processes could not be stopped: {problem}")
    return left


def _stop(host: _Host, cluster: str) -> HostError | None:
    """Kill all processes of a cluster on a host. Returns an error unless it is certain that none is left."""
    try:
        left = run_on_host(host.shell, "stop", host.facts["python"], START_SECONDS, cluster=cluster, **host.place)[
            "left"
        ]
    except HostError as error:
        return error
    if left:
        return HostError(f"These processes on {host.name} could not be killed: {', '.join(left)}.", host.name, "failed")
    return None


# ---- the cluster's record -------------------------------------------------------------------------------------------


def _head(name: str, hosts: Sequence[_Host], known: Head | None) -> Head:
    first = hosts[0]
    node = first.facts.get("node") or {}
    created = known.created if known and known.created else datetime.now(UTC).isoformat(timespec="seconds")
    return Head(
        name=name,
        kind=KIND.name,
        ssh=first.words,
        python=first.facts["python"],
        address=on_host.endpoint(first.facts["address"], node["port"]) if node else "",
        dashboard=node.get("dashboard", 0),
        directory=first.facts["directory"],
        usd_per_hour=None,  # the price of the user's own machines is unknown
        created=created,
        hosts=[host.entry() for host in hosts],
    )


def _entry(head: Head, name: str) -> dict[str, Any]:
    return next(entry for entry in head.hosts if entry["name"] == name)


def _lost(entries: Sequence[dict[str, Any]], nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Return a message for each host that the head's Ray has lost, with the time of the last loss.

    Hosts that were removed from the cluster are not included.
    """
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
    messages = []
    for address, node in sorted(last.items()):
        when = datetime.fromtimestamp(node["ended"]).strftime("%H:%M:%S")
        since = "; it has rejoined since" if address in back else ""
        why = f" ({' '.join(node['why'].split())[:200]})" if node["why"] else ""
        messages.append(f"Ray lost {names[address]} at {when}{why}{since}.")
    return messages
