"""Run roots that are object stores: what their URIs mean, and operations that are tried again when they fail.

The operations use pyarrow's file systems. Credentials come from the environment only (`filesystem_of`); a URI with a
key is rejected, because run.root is written to config.yaml and shown. Imports neither torch nor Ray.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from launcher.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SCHEMES = ("abfs", "abfss", "s3", "gs", "head")
BLOCK_BYTES = 8 << 20
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 20.0
# Maximum time of an operation with its retries, so that a run survives a restart of the store's front end.
_PATIENCE_SECONDS = 120.0
_SECRETS = ("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET", "AWS_SECRET_ACCESS_KEY")
# Not 416: a file that was replaced by a shorter one while it was read.
_FINAL = re.compile(r"\] (400|401|403|404|405|411|413)\b|HTTP status (400|401|403|404)\b|AccessDenied|NoSuchBucket")

Answer = TypeVar("Answer")


def is_uri(root: str) -> bool:
    return "://" in root and not root.startswith("file://")


def is_gathered(root: str) -> bool:
    """Whether it is the disk of the machine that drives the run (`launcher.runs.gathered`)."""
    return root.startswith("head://")


def disk_path(uri: str) -> Path:
    """Return the directory of the driver's machine that such a URI means."""
    return Path(unquote(urlsplit(uri).path))


def disk_uri(path: Path) -> str:
    """Return the URI by which all machines access a path on the disk of the driver's machine."""
    return f"head://{quote(str(path))}"


def plain_path(root: str) -> str:
    """Return the path that `file:///path` means; any other text as it is."""
    if not root.startswith("file://"):
        return root
    parts = urlsplit(root)
    if parts.netloc not in ("", "localhost") or parts.query or not parts.path.startswith("/"):
        raise ConfigError(
            f"run.root={root}: the URI of a directory has three slashes, such as file:///mnt/runs.", key="run.root"
        )
    return unquote(parts.path)


def check_uri(uri: str) -> str:
    """Return the URI without a slash at its end. ConfigError where it is none that can be used, or carries a secret."""
    parts = urlsplit(uri)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in (*SCHEMES, "file"))
        raise ConfigError(
            f"run.root names a scheme, {parts.scheme}://, that is not known. Known are {known}.", key="run.root"
        )
    if parts.scheme == "head":
        if parts.netloc or parts.query or parts.fragment or not re.fullmatch(r"/(?!/).+", parts.path):
            raise ConfigError(
                f"run.root={uri}: a directory of the machine that drives the run has three slashes, head:///PATH.",
                key="run.root",
            )
        return uri.rstrip("/")
    azure = parts.scheme.startswith("abfs")
    if parts.query or parts.fragment or (parts.password or (parts.username and not azure)):
        raise ConfigError(
            "run.root carries more than a place: leave out what follows ? and any key or password. They would be "
            "written to config.yaml; credentials come from the environment, see docs/storage.md.",
            key="run.root",
        )
    if azure and not (parts.username and parts.hostname and "." in parts.hostname):
        raise ConfigError(
            f"run.root={uri}: a place in Azure Blob storage is abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH.",
            key="run.root",
        )
    if not parts.netloc or any(part in (".", "..", "") for part in parts.path.strip("/").split("/")[1:]):
        raise ConfigError(f"run.root={uri} is not a place in an object store: SCHEME://BUCKET/PATH.", key="run.root")
    return uri.rstrip("/")


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """Return pyarrow's file system for a checked URI, and the path in it.

    Azure: AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, else what DefaultAzureCredential finds (a managed identity,
    `az login`, AZURE_CLIENT_ID …). For an emulator LAUNCH_AZURE_BLOB_AUTHORITY and LAUNCH_AZURE_DFS_AUTHORITY give
    host:port, LAUNCH_AZURE_SCHEME `http`. Others: as pyarrow finds them.
    """
    from pyarrow import fs

    parts = urlsplit(uri)
    if is_gathered(uri):
        from launcher.runs import gathered

        return gathered.filesystem(), str(disk_path(uri))
    if not parts.scheme.startswith("abfs"):
        found, path = fs.FileSystem.from_uri(uri)
        return found, path
    given = os.environ.get
    options: dict[str, Any] = {
        "account_key": given("AZURE_STORAGE_KEY"),
        "blob_storage_authority": given("LAUNCH_AZURE_BLOB_AUTHORITY"),
        "dfs_storage_authority": given("LAUNCH_AZURE_DFS_AUTHORITY") or given("LAUNCH_AZURE_BLOB_AUTHORITY"),
        "blob_storage_scheme": given("LAUNCH_AZURE_SCHEME"),
        "dfs_storage_scheme": given("LAUNCH_AZURE_SCHEME"),
    }
    if not options["account_key"]:
        options["sas_token"] = given("AZURE_STORAGE_SAS_TOKEN")
    account = str(parts.hostname).partition(".")[0]
    options = {name: value for name, value in options.items() if value}
    return fs.AzureFileSystem(account, **options), f"{parts.username}{parts.path}"


@dataclass(frozen=True)
class Entry:
    """A file on the store: bytes, and the time of its last change in seconds since 1970."""

    size: int
    mtime: float


@dataclass(frozen=True)
class Store:
    """A place on an object store.

    Every operation is retried, with random delays that grow from half a second to 20 s, until `patience` seconds are
    over; then, or immediately if no retry helps (no such container, no permission), it raises StorageError. Names are
    relative, with slashes.
    """

    filesystem: FileSystem
    path: str
    uri: str
    patience: float = _PATIENCE_SECONDS

    @classmethod
    def open(cls, uri: str, patience: float | None = None) -> Store:
        """Open the place that a checked URI means; nothing is asked of the store yet."""
        given = float(os.environ.get("LAUNCH_STORE_PATIENCE") or _PATIENCE_SECONDS)
        try:
            filesystem, path = filesystem_of(uri)
        except (OSError, ValueError) as error:
            raise StorageError(f"{uri} cannot be used: {_line(error)}. See docs/storage.md for credentials.") from None
        return cls(filesystem, path.rstrip("/"), uri, given if patience is None else min(given, patience))

    def under(self, name: str) -> Store:
        return replace(self, path=f"{self.path}/{name}", uri=f"{self.uri}/{name}")

    def put(self, name: str, source: Path) -> None:
        """Write a file of this machine to the store. FileNotFoundError where it is not there any more."""

        def write() -> None:
            with source.open("rb", buffering=0) as file:
                self._write(name, iter(lambda: file.read(BLOCK_BYTES), b""))

        source.stat()
        self._again(f"{name} could not be written", write)

    def put_bytes(self, name: str, content: bytes) -> None:
        self._again(f"{name} could not be written", lambda: self._write(name, [content]))

    def _write(self, name: str, blocks: Iterable[bytes]) -> None:
        stream = self.filesystem.open_output_stream(f"{self.path}/{name}")
        for block in blocks:
            stream.write(block)
        stream.close()  # not in a `with`: closing completes the file, and a partial file must not be completed

    def read(self, name: str, most: int = 1 << 20) -> bytes:
        """Return a small file, `most` bytes of it. FileNotFoundError where there is none."""

        def read() -> bytes:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
                return bytes(stream.read(most))

        return self._again(f"{name} could not be read", read)

    def get(self, name: str, target: Path, size: int | None = None) -> None:
        """Write a file of the store to this machine, whole or not at all; FileNotFoundError where there is none.

        StorageError if it does not have `size` bytes.
        """
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")

        def read() -> None:
            left = size
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream, temporary.open("xb") as file:
                while block := stream.read(BLOCK_BYTES):
                    left = None if left is None else left - len(block)
                    if left is not None and left < 0:
                        break
                    file.write(block)
            if left:
                raise WrongSize(f"{self.uri}/{name} does not have the {size} bytes that it should have.")

        def anew() -> None:
            temporary.unlink(missing_ok=True)
            read()

        try:
            self._again(f"{name} could not be read", anew)
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def entries(self, name: str = "", recursive: bool = True) -> dict[str, Entry]:
        """Return the files below `name` by their names relative to this place; none where there is no such folder.

        A name that would leave the target folder is skipped.
        """
        from pyarrow import fs

        start = f"{self.path}/{name}".rstrip("/")
        selector = fs.FileSelector(start, recursive=recursive, allow_not_found=True)
        infos = self._again("its files could not be listed", lambda: self.filesystem.get_file_info(selector))
        found = {}
        for info in infos:
            relative = info.path[len(self.path) + 1 :]
            if info.type == fs.FileType.File and is_tame(relative):
                mtime = info.mtime.timestamp() if info.mtime else 0.0
                found[relative] = Entry(info.size or 0, mtime)
        return found

    def remove(self, name: str = "") -> None:
        """Delete a folder and all below it; one that is not there is no error.

        Only whole folders: pyarrow deletes a single blob under a lease that it releases after the blob is deleted, and
        one in thirty of these rejected requests stalled for seven seconds.
        """

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_dir(f"{self.path}/{name}".rstrip("/"))

        self._again(f"{name or 'it'} could not be deleted", remove)

    def _again(self, what: str, do: Callable[[], Answer]) -> Answer:
        deadline = time.monotonic() + self.patience
        for tries, delay in enumerate(_delays(), 1):
            try:
                return do()
            except (FileNotFoundError, WrongSize):
                raise
            except OSError as error:
                text = _line(error)
                if _FINAL.search(text) or time.monotonic() + delay > deadline:
                    times = "once" if tries == 1 else f"{tries} times"
                    raise StorageError(f"{self.uri}: {what} (tried {times}): {text}.") from None
                time.sleep(delay)
        raise AssertionError


class WrongSize(StorageError):
    pass


def is_tame(name: str) -> bool:
    """Whether a relative name stays below the directory that it is put in."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and "\0" not in part and "\\" not in part for part in parts)


def _delays() -> Iterator[float]:
    """Exponential backoff with jitter, so that many workers do not come back at the same moment."""
    delay = _FIRST_DELAY
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, _LONGEST_DELAY)


def _line(error: BaseException) -> str:
    """Return an error's message in one line, without possible secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"\?[^\s'\"]*", "", text)  # a SAS token is in the query of a URL
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text.partition(" RequestId:")[0][:400].rstrip(". ")
