"""A Ray cluster that runs already: used as it is, and left running.

    nodes = look(address)                             # what it has; no driver, nothing started
    with ExistingRay(address, python_path) as cluster:
        ...                                           # ray.is_initialized(), every node compared with this process

The address is `cluster.address`, or RAY_ADDRESS. Its token is where Ray looks for it: RAY_AUTH_TOKEN,
RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.clusters import local
from launcher.errors import ClusterError, ResourceError

CONNECT_SECONDS = 5.0
_NAMESPACE = b"launch"
NODE_SECONDS = 60.0  # a node may have to start its first worker process
# What has to be alike, and what an error calls it.
_COMPARED = {"python": "Python", "ray": "Ray", "torch": "torch", "project": "this project (a digest of its files)"}


@dataclass(frozen=True)
class Node:
    """One machine of a cluster: its id in Ray, host name, address, and what Ray may give away of it."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float


def address_of(asked: str | None) -> str:
    """Return HOST:PORT of the cluster that is meant.

    Raises:
        ClusterError: none is named, or it is not HOST:PORT.
    """
    address = asked or os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        return address
    found = f"cluster.address is {asked!r}" if asked else f"RAY_ADDRESS is {address!r}" if address else "none was given"
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the Ray Jobs API of a cluster, to which `launch train` sends single runs. Sweeps (-m) and "
            "`launch plan` need cluster.address=HOST:PORT, on a node of that cluster."
        )
    raise ClusterError(
        f"cluster=existing needs the address of a Ray cluster, and {found}. Write cluster.address=HOST:PORT as "
        "`ray start --head` prints it (port 6379 by default), on a machine that is a node of that cluster."
    )


def look(address: str) -> list[Node]:
    """Return the nodes that live, by address. Becomes no driver and starts nothing.

    Raises:
        ClusterError: nobody answers there, or without the right token only.
    """
    _reachable(address)
    from ray._raylet import GcsClient

    with _as_client():
        try:
            found = GcsClient(address=address).get_all_node_info(timeout=CONNECT_SECONDS)
        except Exception as error:
            raise _refused(address, error) from None
    nodes = [
        Node(
            id=key.hex(),
            host=info.node_manager_hostname,
            address=info.node_manager_address,
            cpus=info.resources_total.get("CPU", 0.0),
            gpus=info.resources_total.get("GPU", 0.0),
        )
        for key, info in found.items()
        if info.state == 0  # alive
    ]
    return sorted(nodes, key=lambda node: node.address)


def room(nodes: Sequence[Node], cpus_per_worker: float, gpus_per_worker: float) -> float:
    """Return how many workers fit: one never spans two machines."""
    return sum(
        min(
            local.most_workers(cpus_per_worker, node.cpus, whole=False),
            local.most_workers(gpus_per_worker, node.gpus, whole=True),
        )
        for node in nodes
    )


def check_feasible(workers: int, cpus_per_worker: float, gpus_per_worker: float, nodes: Sequence[Node]) -> None:
    """Refuse what the nodes can never hold.

    Raises:
        ResourceError: names both numbers and what to set.
    """
    most = room(nodes, cpus_per_worker, gpus_per_worker)
    if workers <= most:
        return
    total = (sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    local.check_feasible(workers, cpus_per_worker, gpus_per_worker, total, where="in the cluster")
    cure = f"Set scaling.workers={most:g}, lower" if most else "Lower"
    raise ResourceError(
        f"{workers} workers with {cpus_per_worker:g} CPU and {gpus_per_worker:g} GPU each were asked for, and the "
        f"{len(nodes)} nodes have room for {most:g}: each worker sits on one node ({described(nodes)}). {cure} "
        "scaling.cpus_per_worker or scaling.gpus_per_worker, or add nodes."
    )


def described(nodes: Sequence[Node]) -> str:
    """Return the nodes for people: `vm1 10.0.0.4 (24 CPU, 1 GPU), …`."""
    return ", ".join(f"{node.host} {node.address} ({node.cpus:g} CPU, {node.gpus:g} GPU)" for node in nodes)


class ExistingRay:
    """This process as a driver of a cluster for the length of a `with` block. The attributes are those of EmbeddedRay.

    Args:
        address: HOST:PORT of its GCS.
        python_path: directories whose modules the workers need.
        directory: the run's, which every node has to see; None where nothing is written.
        verbose: with Ray's messages.
        environment: names of variables that the workers get from this process.
        gathers: workers on other machines write to the disk of this one (`launcher.gathered`).
    """

    def __init__(
        self,
        address: str,
        python_path: Sequence[str] = (),
        directory: str | None = None,
        verbose: bool = False,
        environment: Sequence[str] = (),
        gathers: bool = False,
    ) -> None:
        self.address = address
        self.existing = True
        self.directory = Path()
        self.available: tuple[float, float] = (0.0, 0.0)
        # Also of a cluster of one: another node may join. Its workers talk over the node's own address.
        self.one_machine = False
        self._python_path = list(python_path)
        self._run = directory
        self._verbose = verbose
        self._environment = environment
        self._gathers, self._disk = gathers, None
        self._connected = False

    def __enter__(self) -> ExistingRay:
        import ray

        self.directory = local.private_directory()
        try:
            if not ray.is_initialized():
                self._connect()
            nodes = look(self.address)
            self.available = (sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
            compare(nodes, self._python_path, self._run)
            _share_environment(self._environment)
            if self._gathers:
                self._disk = _serve_disk()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave()

    def dead_process(self) -> str | None:
        """Nothing of this Ray is ours: its end is told by `fit`."""
        return None

    def _connect(self) -> None:
        import ray

        nodes = look(self.address)
        own = next((node.address for node in nodes if _is_here(node.address)), None)
        if own is None:  # Ray's native part would end this process
            raise ClusterError(
                f"cluster=existing: this machine ({socket.gethostname()}) is no node of the Ray cluster at "
                f"{self.address} ({described(nodes)}), and a driver needs a Ray process on its own machine. Run this "
                "command on a node of the cluster, or join it with `ray start --address=…`."
            )
        quiet = [] if self._verbose else local.silence()
        level = logging.INFO if self._verbose else logging.ERROR
        with _as_client(local.RAY_TRAIN_ENVIRONMENT), local.signal_handlers_kept(), local.replaced(quiet):
            try:
                ray.init(address=self.address, log_to_driver=self._verbose, logging_level=level, _node_ip_address=own)
            except Exception as error:
                ray.shutdown()
                raise _refused(self.address, error) from None
        self._connected = True

    def _leave(self) -> None:
        if self._connected:
            import ray

            with contextlib.suppress(Exception):
                _share_environment(())
            with contextlib.suppress(Exception):
                ray.shutdown()
            self._connected = False
        shutil.rmtree(self.directory, ignore_errors=True)


# ---- what the nodes have --------------------------------------------------------------------------------------------


def compare(nodes: Sequence[Node], python_path: Sequence[str], directory: str | None) -> None:
    """Compare every node with this process, before anything is trained.

    Raises:
        ClusterError: versions differ, or a directory is not there; names hosts.
    """
    home = str(Path(__file__).resolve().parents[2])
    own = _facts()(home, [], [])
    problems = []
    for node, facts in zip(nodes, _ask(nodes, home, python_path, [directory] if directory else []), strict=True):
        where = f"{node.host} ({node.address})"
        if isinstance(facts, str):
            problems.append(f"{where} did not answer: {facts}")
            continue
        for key, name in _COMPARED.items():
            if facts[key] != own[key]:
                problems.append(f"{name} is {facts[key] or 'missing'} on {where} and {own[key] or 'missing'} here")
        problems += [f"the calling directory {path} is not there on {where}" for path in facts["no_modules"]]
        problems += [f"the run's directory {path} is not seen on {where}" for path in facts["no_run"]]
    if problems:
        raise ClusterError(
            f"The nodes of the cluster cannot run this job as it is here: {'; '.join(problems)}. Install the same "
            "versions on every node, and keep the calling directory and run.root on a file system that all nodes "
            "share under the same path."
        )


def _ask(
    nodes: Sequence[Node], home: str, python_path: Sequence[str], directories: Sequence[str]
) -> list[dict[str, Any] | str]:
    """Return the facts of every node, or why there are none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    facts = _facts()

    def ask(node: Node) -> Any:
        place = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(facts)
        return task.remote(home, list(python_path), list(directories))

    asked = [ask(node) for node in nodes]
    done = set(ray.wait(asked, num_returns=len(asked), timeout=NODE_SECONDS)[0])
    answers: list[dict[str, Any] | str] = []
    for one in asked:
        if one not in done:
            answers.append(f"no answer within {NODE_SECONDS:g} s")
            continue
        try:
            answers.append(ray.get(one))
        except Exception as error:
            answers.append((str(error).strip().splitlines() or [type(error).__name__])[-1])
    return answers


def _facts() -> Callable[[str, list[str], list[str]], dict[str, Any]]:
    """Return a function that finds out what a node has.

    A function within a function travels by value: our package may not be installed there, or be another.
    """

    def facts(home: str, python_path: list[str], directories: list[str]) -> dict[str, Any]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import os
        import platform
        import sys
        from pathlib import Path

        def version(name: str) -> str:
            try:
                return importlib.metadata.version(name).partition("+")[0]  # torch with and without CUDA talk
            except importlib.metadata.PackageNotFoundError:
                return ""

        def project() -> str:
            sys.path.append(home)
            try:
                found = [importlib.util.find_spec(name) for name in ("launcher", "models")]
            finally:
                sys.path.remove(home)
            roots = [Path(place) for spec in found if spec for place in spec.submodule_search_locations or ()]
            files = sorted(
                (path.relative_to(root.parent).as_posix(), path) for root in roots for path in root.rglob("*.py")
            )
            digest = hashlib.sha256()
            for name, path in files:
                digest.update(name.encode() + b"\0" + path.read_bytes())
            return digest.hexdigest()[:12] if files else ""

        return {
            "python": ".".join(platform.python_version_tuple()[:2]),
            "ray": version("ray"),
            "torch": version("torch"),
            "project": project(),
            "no_modules": [path for path in python_path if not os.path.isdir(path)],
            "no_run": [path for path in directories if not os.path.isdir(path)],
        }

    return facts


# ---- values of the environment --------------------------------------------------------------------------------------


def _environment_key() -> str:
    import ray

    return f"environment/{ray.get_runtime_context().get_job_id()}"


def _share_environment(names: Sequence[str]) -> None:
    """Have the workers of this driver find the values of these variables; of none: have them find nothing.

    They go through the memory of the head's key-value store. Ray's own way, a runtime environment, shows them in its
    logs and in lists of processes.
    """
    from ray.experimental import internal_kv

    values = {name: os.environ[name] for name in names if name in os.environ}
    if values:
        internal_kv._internal_kv_put(_environment_key(), json.dumps(values), overwrite=True, namespace=_NAMESPACE)
    else:
        internal_kv._internal_kv_del(_environment_key(), namespace=_NAMESPACE)


def adopt() -> None:
    """In a worker: take over the variables that its driver shares, and the way to its disk."""
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(_environment_key(), namespace=_NAMESPACE)
    if found is not None:
        os.environ.update(json.loads(found))
    _reach_disk()


# ---- the disk of the driver's machine -------------------------------------------------------------------------------

_DISK = "launch-disk"
_DISK_SECONDS = 60.0


def _serve_disk() -> Any:
    """Start the process through which workers on other nodes use the disk of this one; it ends with this driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    home = str(Path(__file__).resolve().parents[2])

    class HeadDisk:  # within a function it travels by value
        def __init__(self) -> None:
            if home not in sys.path:
                sys.path.append(home)
            from launcher.gathered import Disk

            self._disk = Disk()

        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

        def do(self, name: str, arguments: tuple[Any, ...]) -> Any:
            return getattr(self._disk, name)(*arguments)

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 16, "max_restarts": -1, "max_task_retries": -1}
    disk = ray.remote(**options)(HeadDisk).options(name=_DISK, scheduling_strategy=here).remote()
    ray.get(disk.node.remote(), timeout=NODE_SECONDS)
    return disk


def _reach_disk() -> None:
    """Where the driver serves its disk and this is another node, have files of the run go there."""
    import ray

    try:
        disk = ray.get_actor(_DISK)
    except ValueError:  # none is served
        return
    if ray.get(disk.node.remote(), timeout=NODE_SECONDS) == ray.get_runtime_context().get_node_id():
        return
    from launcher import gathered

    def call(name: str, *arguments: Any) -> Any:
        try:
            return ray.get(disk.do.remote(name, arguments), timeout=_DISK_SECONDS)
        except OSError:
            raise
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"the head of the cluster did not answer: {said}") from None

    gathered.through(call)


# ---- the connection -------------------------------------------------------------------------------------------------


def _reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"cluster=existing: nobody answers at {address} ({error.strerror or error}). Is Ray running there (`ray "
            "status`), and is this its GCS address, with port 6379 by default?"
        ) from None


def _is_here(address: str) -> bool:
    """Whether this machine has the address: only then can it be listened on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _refused(address: str, error: Exception) -> ClusterError:
    said = " ".join(str(error).split())
    if "token" in said.lower() or "UNAUTHENTICATED" in said:
        cure = "Give this process the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
    elif "Version mismatch" in said:
        cure = "Use the same versions here and on its nodes."
    else:
        cure = "`ray status` on a node shows whether the cluster is well."
    return ClusterError(f"cluster=existing: the Ray cluster at {address} could not be used: {said[:400]} {cure}")


@contextlib.contextmanager
def _as_client(more: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have Ray's native part read how to authenticate: a client does not look for a token by itself."""
    values = dict(more or {})
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()
    if os.environ.get("RAY_AUTH_MODE") == "token" and not has_token:  # Ray's native part would end this process
        raise ClusterError(
            "RAY_AUTH_MODE=token asks for a token, and there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token. Take it from the cluster's head node."
        )
    if has_token:
        values.setdefault("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "token"))
    with local.environment_set(values):
        local.refresh_ray_settings()
        yield


def interface_of(address: str) -> str | None:
    """Return the network interface that carries an IPv4 address; None where it cannot be told."""
    if sys.platform != "linux":
        return None
    import fcntl
    import struct

    wanted = socket.inet_aton(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24] == wanted:  # SIOCGIFADDR
                    return name
    return None
