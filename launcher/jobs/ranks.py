"""Being one of the ranks that torchrun or srun started: joining the others, and telling a failure once.

Rank 0 talks for all. A rank that fails leaves word in the store where the ranks met, so that rank 0 can tell the cause
and not that a connection was closed.
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
# How long rank 0 looks for the word of a rank that failed, and how long that one gives rank 0 to tell it: torchrun ends
# all others as soon as one has ended.
_LOOK_SECONDS, _LINGER_SECONDS = 3.0, 2.0


def in_environment() -> Facts | None:
    """Return who this process is when torchrun or srun started it, else None.

    Raises:
        ConfigError: srun did, and nobody says where the ranks meet.
    """
    if not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"} & os.environ.keys():
        return None  # the usual case needs no torch to know it
    from launcher.engine.runtime import ranks_in_environment

    return ranks_in_environment()


def speaks() -> bool:
    """Whether this process is the one that talks to the user."""
    try:
        facts = in_environment()
    except ConfigError:
        return os.environ.get("SLURM_PROCID", "0") == "0"
    return facts is None or facts[0] == 0


@contextmanager
def joined(facts: Facts, device: str) -> Iterator[Runtime]:
    """Join the other ranks for the length of the block.

    Raises:
        ConfigError: they could not meet.
        LaunchError: what the block raised; on rank 0, where it only noticed that another rank was gone, that one's.
    """
    from launcher.engine.runtime import Runtime

    try:
        runtime = Runtime.from_environment(facts, device)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"Rank {facts[0]} of {facts[1]} could not meet the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}: {str(error).splitlines()[0].rstrip('.')}. Start all of them, with one "
            "address and one free port, for example by torchrun."
        ) from error
    store = _store()
    try:
        yield runtime
    except BaseException as error:
        lost = isinstance(error, WorkerLost) and not isinstance(error, LoaderLost)
        genuine = isinstance(error, LaunchError) and not lost
        if genuine:
            _leave_word(store, error)
        elif runtime.is_first and (cause := _word(store, isinstance(error, WorkerLost))):
            raise cause from None
        if genuine and not runtime.is_first:
            runtime.close()  # rank 0 may wait for this rank: now it learns that it is gone
            with suppress(Stopped):
                time.sleep(_LINGER_SECONDS)
        raise
    finally:
        with suppress(RuntimeError):
            runtime.close()


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _leave_word(store: Any, error: BaseException) -> None:
    with suppress(Exception):  # the store may have gone with rank 0
        store.compare_set(_FAILURE, "", json.dumps(to_dict(error)))


def _word(store: Any, patiently: bool) -> LaunchError | None:
    end = time.monotonic() + (_LOOK_SECONDS if patiently else 0.0)
    with suppress(Exception, Stopped):  # torchrun ends us meanwhile: then what we know ourselves is told
        while not store.check([_FAILURE]):
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        return from_dict(json.loads(store.get(_FAILURE)))
    return None
