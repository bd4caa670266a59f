"""Ray Jobs: processes on the head of a cluster, started and watched over HTTP.

    jobs = Jobs("http://127.0.0.1:8265", token)
    jobs.put("order-1", content)                       # kept in the head's memory until the job takes it
    jobs.submit("launch-1", "exec python -m …", {"PYTHONPATH": "…"})
    for text in jobs.tail("launch-1", skip=0): ...     # what it prints

Nothing secret may be in a job's entrypoint, metadata or runtime environment: Ray writes them to its logs and shows them
in lists of processes. `put` is for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from launcher.clusters.gcs import as_client
from launcher.errors import ClusterError
from launcher.ray_seam import kv, private

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

OVER = ("SUCCEEDED", "FAILED", "STOPPED")
REQUEST_SECONDS = 30.0
# How long a driver may take to save and stop before Ray kills it.
STOP_SECONDS = 3600


class Unreachable(Exception):
    """The cluster does not answer at this moment."""


def checked_url(address: str) -> str:
    """Return the URL of a Ray Jobs API without a slash at its end. ClusterError where it is none, or has a password."""
    parts = urlsplit(address)
    if parts.username or parts.password or parts.query or not parts.hostname:
        raise ClusterError(
            "cluster.address is the URL of Ray's dashboard, http://HOST:PORT, without a user or a password: it is "
            "written to config.yaml. The token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
        )
    return address.rstrip("/")


def own_token() -> str | None:
    """Return this user's token for Ray from where Ray looks for it."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    with contextlib.suppress(OSError):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        return path.read_text().strip() or None
    return None


class Jobs:
    """The Ray Jobs API of one cluster.

    Args:
        url: of its dashboard.
        token: of the cluster, where it asks for one.

    Raises:
        ClusterError: nobody answers there, or not with this token.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            from ray.job_submission import JobSubmissionClient

            private.quiet_jobs_client()
            self._client: JobSubmissionClient = JobSubmissionClient(url, headers=dict(self._headers))
        except Exception as error:
            raise refused(url, error) from None

    def put(self, key: str, content: bytes) -> None:
        """Keep `content` in the memory of the head, to be fetched with `take`. ClusterError where it is refused."""
        import requests

        address = self.url + kv.package_path(key)
        try:
            requests.put(address, data=content, headers=self._headers, timeout=REQUEST_SECONDS).raise_for_status()
        except requests.RequestException as error:
            raise refused(self.url, error) from None

    def submit(
        self, job: str, entrypoint: str, environment: Mapping[str, str], modules: Sequence[Path] = (), **more: Any
    ) -> None:
        """Start a job. modules: directories that it and its workers can import, sent along.

        Raises:
            ClusterError: it was refused.
        """
        runtime: dict[str, Any] = {"env_vars": {**environment, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}, **more}
        if modules:
            runtime["py_modules"] = [str(path) for path in modules]
        try:
            self._client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime)
        except Exception as error:
            raise refused(self.url, error) from None

    def status(self, job: str) -> str:
        """Return PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; GONE where the cluster knows no such job.

        Raises:
            Unreachable: nobody answers.
        """
        try:
            return str(self._client.get_job_status(job).value)
        except Exception as error:
            if "404" in str(error):
                return "GONE"
            raise Unreachable(_line(error)) from None

    def unfinished(self) -> list[str]:
        """Return the ids of the submitted jobs that have not ended. Unreachable where nobody answers."""
        try:
            listed = self._client.list_jobs()
        except Exception as error:
            raise Unreachable(_line(error)) from None
        return [one.submission_id for one in listed if one.submission_id and str(one.status.value) not in OVER]

    def stop(self, job: str) -> None:
        """Send the job SIGTERM. Unreachable where nobody answers; a job that is over is no error."""
        try:
            self._client.stop_job(job)
        except Exception as error:
            if "404" not in str(error):
                raise Unreachable(_line(error)) from None

    def message(self, job: str) -> str:
        """Return what Ray says of a job's end."""
        with contextlib.suppress(Exception):
            return self._client.get_job_info(job).message or ""
        return ""

    def log(self, job: str) -> str:
        """Return all that a job has printed. Unreachable where nobody answers."""
        try:
            return self._client.get_job_logs(job)
        except Exception as error:
            raise Unreachable(_line(error)) from None

    def tail(self, job: str, skip: int, pause: float = 0.5) -> Iterator[str | None]:
        """Yield what a job prints after its first `skip` characters until it ends; None after a pause without a word.

        Raises:
            Unreachable: the connection is lost.
        """
        loop = asyncio.new_event_loop()
        chunks: AsyncIterator[str] = self._client.tail_job_logs(job)
        following: asyncio.Task[str] | None = None
        try:
            while True:
                following = following or loop.create_task(_next(chunks))
                loop.run_until_complete(asyncio.wait({following}, timeout=pause))
                if not following.done():
                    yield None
                    continue
                try:
                    text = following.result()
                except StopAsyncIteration:
                    return
                except Exception as error:
                    raise Unreachable(_line(error)) from None
                finally:
                    following = None
                kept, skip = text[skip:], max(0, skip - len(text))
                yield kept  # nothing, where all of it was read before: the connection lives
        finally:
            if following is not None:
                following.cancel()
                loop.run_until_complete(asyncio.wait({following}, timeout=5))
            with contextlib.suppress(Exception):
                loop.run_until_complete(asyncio.wait_for(chunks.aclose(), 5))  # type: ignore[attr-defined]
            loop.close()


async def _next(chunks: AsyncIterator[str]) -> str:
    return await anext(chunks)


def take(address: str, key: str) -> bytes | None:
    """Return what `Jobs.put` has left in the memory of the head, once: it is deleted there.

    Args:
        address: HOST:PORT of the cluster's GCS.
    """
    with as_client():
        return kv.take_package(key, private.gcs_client(address))


def refused(url: str, error: Exception) -> ClusterError:
    said = _line(error)
    if "401" in said or "403" in said or "token" in said.lower():
        cure = "Give this process the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
    else:
        cure = "Is Ray's dashboard running there (`ray start --head --dashboard-port=8265`), and is this its address?"
    return ClusterError(f"The Ray Jobs API at {url} could not be used: {said} {cure}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".") + "."
