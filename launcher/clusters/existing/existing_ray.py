"""Connects this process to a running Ray cluster, and leaves the cluster running.

    with ExistingRay(address, python_path) as cluster:
        ...      # ray.is_initialized(), and every node was compared with this process

`gcs.py` describes how the address and the token are found.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from launcher.clusters.capacity import describe
from launcher.clusters.gcs import as_client, connection_error, is_own_address, living_nodes
from launcher.clusters.ray_process import preload, preserved_signal_handlers, private_directory
from launcher.clusters.remote.compare import compare
from launcher.clusters.remote.from_driver import serve_disk, share_environment, wait_for_disk
from launcher.errors import ClusterError
from launcher.ray_seam import private
from launcher.ray_seam.settings import RAY_TRAIN_ENVIRONMENT


class ExistingRay:
    """Makes this process a driver of a cluster while a `with` block runs. It has the attributes of `EmbeddedRay`.

    Args:
        address: HOST:PORT of the cluster's GCS.
        python_path: directories whose modules the workers import.
        directory: the run's directory, which every node must see; None if nothing is written.
        verbose: print Ray's messages.
        environment: names of environment variables to pass to the workers.
        gathers: workers on other machines write to the disk of this machine (`launcher.runs.gathered`).
        modules: modules to import while the nodes answer.
    """

    def __init__(
        self,
        address: str,
        python_path: Sequence[str] = (),
        directory: str | None = None,
        verbose: bool = False,
        environment: Sequence[str] = (),
        gathers: bool = False,
        modules: Sequence[str] = (),
    ) -> None:
        self.address = address
        self.existing = True
        self.directory = Path()
        self.available: tuple[float, float] = (0.0, 0.0)
        # Also for a cluster of one node: another may join. Workers use the address of their node.
        self.one_machine = False
        self._python_path = list(python_path)
        self._run = directory
        self._verbose = verbose
        self._environment = environment
        self._gathers = gathers
        self._disk: Any = None
        self._modules = modules
        self._connected = False

    def __enter__(self) -> ExistingRay:
        self.directory = private_directory()
        loading = preload(self._modules)
        try:
            if not ray.is_initialized():
                self._connect()
            nodes = living_nodes(self.address)
            self.available = (sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
            if self._gathers:
                self._disk = serve_disk()  # its process starts while the nodes answer
            compare(nodes, self._python_path, self._run)
            share_environment(self._environment)
            if self._disk is not None:
                wait_for_disk(self._disk)
            loading.join()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave()

    def dead_process(self) -> str | None:
        """Return None: this process started none of the cluster's processes. `fit` reports the loss of the cluster."""
        return None

    def _connect(self) -> None:
        nodes = living_nodes(self.address)
        own = next((node.address for node in nodes if is_own_address(node.address)), None)
        if own is None:  # Ray's native code would exit this process
            raise ClusterError(
                f"cluster=existing: this machine ({socket.gethostname()}) is not a node of the Ray cluster at "
                f"{self.address} ({describe(nodes)}), and a driver must run on a node. Run this command on a node of "
                "the cluster, or join the cluster with `ray start --address=…`."
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
            with contextlib.suppress(Exception):
                share_environment(())
            with contextlib.suppress(Exception):
                ray.shutdown()
            self._connected = False
        shutil.rmtree(self.directory, ignore_errors=True)
