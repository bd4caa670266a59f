"""A Ray cluster that runs already: used as it is, and left running.

    with ExistingRay(address, python_path) as cluster:
        ...                                           # ray.is_initialized(), every node compared with this process

Its address and its token: see `gcs.py`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.clusters.capacity import describe
from launcher.clusters.gcs import as_client, connection_error, is_own_address, living_nodes
from launcher.clusters.ray_process import preserved_signal_handlers, private_directory
from launcher.clusters.remote.compare import compare
from launcher.clusters.remote.from_driver import serve_disk, share_environment
from launcher.errors import ClusterError
from launcher.ray_seam import private
from launcher.ray_seam.settings import RAY_TRAIN_ENVIRONMENT


class ExistingRay:
    """This process as a driver of a cluster for the length of a `with` block. The attributes are those of EmbeddedRay.

    Args:
        address: HOST:PORT of its GCS.
        python_path: directories whose modules the workers need.
        directory: the run's, which every node has to see; None where nothing is written.
        verbose: with Ray's messages.
        environment: names of variables that the workers get from this process.
        gathers: workers on other machines write to the disk of this one (`launcher.runs.gathered`).
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

        self.directory = private_directory()
        try:
            if not ray.is_initialized():
                self._connect()
            nodes = living_nodes(self.address)
            self.available = (sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
            compare(nodes, self._python_path, self._run)
            share_environment(self._environment)
            if self._gathers:
                self._disk = serve_disk()
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

        nodes = living_nodes(self.address)
        own = next((node.address for node in nodes if is_own_address(node.address)), None)
        if own is None:  # Ray's native part would end this process
            raise ClusterError(
                f"cluster=existing: this machine ({socket.gethostname()}) is no node of the Ray cluster at "
                f"{self.address} ({describe(nodes)}), and a driver needs a Ray process on its own machine. Run this "
                "command on a node of the cluster, or join it with `ray start --address=…`."
            )
        quiet = contextlib.nullcontext() if self._verbose else private.quiet_errors()
        level = logging.INFO if self._verbose else logging.ERROR
        with as_client(RAY_TRAIN_ENVIRONMENT), preserved_signal_handlers(), quiet:
            try:
                ray.init(
                    address=self.address,
                    log_to_driver=self._verbose,
                    logging_level=level,
                    job_config=private.driver_job_config(),
                    **private.init_options(own),
                )
            except Exception as error:
                ray.shutdown()
                raise connection_error(self.address, error) from None
        self._connected = True

    def _leave(self) -> None:
        if self._connected:
            import ray

            with contextlib.suppress(Exception):
                share_environment(())
            with contextlib.suppress(Exception):
                ray.shutdown()
            self._connected = False
        shutil.rmtree(self.directory, ignore_errors=True)


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
