"""The key-value store that every Ray cluster has: small texts under keys, in a namespace of launch's own.

Each function uses the cluster that this process is connected to; with `client` (`private.gcs_client`) it uses another.
`seconds` limits how long the store may take to answer; the default is Ray's own limit.

Why: no public part of Ray passes small messages without another process; `ray.experimental.internal_kv` covers the own
cluster alone.
Since: 2.44 or older.
Without: no events from workers, no requests to them, no notices of evictions.
"""

from __future__ import annotations

from typing import Any

# Imported by name, not as a module: these functions are pickled by value for Ray Train's controller.
from launcher.ray_seam.private import own_gcs_client

NAMESPACE = b"launch"


def put(key: str, value: str, client: Any = None, seconds: float | None = None) -> None:
    """Store `value`, and replace what the key had."""
    _store(client).internal_kv_put(key.encode(), value.encode(), overwrite=True, namespace=NAMESPACE, timeout=seconds)


def get(key: str, client: Any = None, seconds: float | None = None) -> str | None:
    """Return the value of a key; None if it does not exist."""
    found = _store(client).internal_kv_get(key.encode(), namespace=NAMESPACE, timeout=seconds)
    return None if found is None else found.decode()


def keys(prefix: str, client: Any = None, seconds: float | None = None) -> list[str]:
    """Return the keys that begin with `prefix`, sorted."""
    found = _store(client).internal_kv_keys(prefix.encode(), namespace=NAMESPACE, timeout=seconds)
    return sorted(key.decode() for key in found)


def delete(key: str, client: Any = None, seconds: float | None = None) -> None:
    """Remove a key. A key that does not exist is no error."""
    _store(client).internal_kv_del(key.encode(), del_by_prefix=False, namespace=NAMESPACE, timeout=seconds)


def delete_all(prefix: str) -> None:
    """Remove every key that begins with `prefix`."""
    _store(None).internal_kv_del(prefix.encode(), del_by_prefix=True, namespace=NAMESPACE)


def take_package(key: str, client: Any) -> bytes | None:
    """Return and remove what was uploaded to `package_path(key)`; None if nothing was.

    Why: bytes for a driver on the head must be in no list of processes and no log. Ray Jobs has no such channel.
    Since: 2.44 or older.
    Without: no values of environment variables for runs that a cluster's head drives.
    """
    name = f"gcs://{key}".encode()
    found: bytes | None = client.internal_kv_get(name, None)
    client.internal_kv_del(name, False, None)
    return found


def package_path(key: str) -> str:
    """Return the path of the dashboard's HTTP API that stores the body of a PUT request in the head's memory.

    Why, since, without: see `take_package`.
    """
    return f"/api/packages/gcs/{key}"


def _store(client: Any) -> Any:
    return own_gcs_client() if client is None else client
