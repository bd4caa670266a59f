"""Joins the ranks that torchrun or srun started, and reports a failure once.

Only rank 0 prints. A rank that fails writes its error to the store of the rendezvous, so that rank 0 reports the cause
instead of a closed connection.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigError, LaunchError, LoaderLost, Stopped, WorkerLost, from_dict, to_dict

if TYPE_CHECKING:
    from launcher.engine.runtime import Runtime

Facts = tuple[int, int, int, int]  # rank, world size, local rank, local world size

_FAILURE = "launch/failure"
# Rank 0 waits for the error of a rank that failed. That rank exits later, since torchrun then kills all others.
_LOOK_SECONDS, _LINGER_SECONDS = 3.0, 2.0


def in_environment() -> Facts | None:
    """Return the rank facts of this process if torchrun or srun started it, else None.

    Raises:
        ConfigError: srun started it, and the address of the rendezvous is missing.
    """
    if not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        return None  # without importing torch
    from launcher.engine.runtime import ranks_in_environment

    return ranks_in_environment()


def prints() -> bool:
    """Return whether this process prints for the user: rank 0, or a process without ranks."""
    try:
        facts = in_environment()
    except ConfigError:
        return os.environ.get("SLURM_PROCID", "0") == "0"
    return facts is None or facts[0] == 0


@contextmanager
def joined(facts: Facts, device: str) -> Iterator[Runtime]:
    """Join the process group of all ranks for the block.

    Raises:
        ConfigError: the rendezvous failed.
        LaunchError: the error of the block. If rank 0 has lost another rank, it raises the error of that rank.
    """
    from launcher.engine.runtime import Runtime

    try:
        runtime = Runtime.from_environment(facts, device)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"Rank {facts[0]} of {facts[1]} could not join the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0].rstrip('.')}. Start all ranks with the same "
            "address and a free port, for example with torchrun."
        ) from error
    store = _store()
    try:
        yield runtime
    except BaseException as error:
        lost = isinstance(error, WorkerLost) and not isinstance(error, LoaderLost)
        genuine = isinstance(error, LaunchError) and not lost
        if genuine:
            _publish_error(store, error)
        elif runtime.is_first and (cause := _published_error(store, isinstance(error, WorkerLost))):
            raise cause from None
        if genuine and not runtime.is_first:
            runtime.close()  # rank 0 may wait for this rank in a collective, which now fails
            with suppress(Stopped):
                time.sleep(_LINGER_SECONDS)
        raise
    finally:
        with suppress(RuntimeError):
            runtime.close()


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _publish_error(store: Any, error: BaseException) -> None:
    with suppress(Exception):  # the store may have ended with rank 0
        store.compare_set(_FAILURE, "", json.dumps(to_dict(error)))


def _published_error(store: Any, wait: bool) -> LaunchError | None:
    end = time.monotonic() + (_LOOK_SECONDS if wait else 0.0)
    with suppress(Exception, Stopped):  # torchrun may kill this process: then it reports its own error
        while not store.check([_FAILURE]):
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        return from_dict(json.loads(store.get(_FAILURE)))
    return None
