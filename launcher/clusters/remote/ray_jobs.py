"""A client of Ray Jobs, which starts and watches processes on the head of a cluster over HTTP.

    jobs = Jobs("http://127.0.0.1:8265", token)
    jobs.put("launch-1", content)                      # in the head's memory, until the job takes it
    jobs.submit("launch-1", "exec python -m …", {"PYTHONPATH": "…"})
    for text in jobs.tail("launch-1", skip=0): ...     # the output of the job

A job's entrypoint, metadata and runtime environment must contain no secret, because Ray writes them to its logs and
shows them in lists of processes. Secrets are sent with `put`.
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
# The time that a driver has to save a checkpoint and exit before Ray kills it.
STOP_SECONDS = 3600


class Unreachable(Exception):
    """The cluster does not answer now. The caller may retry."""


def checked_url(address: str) -> str:
    """Return the URL of a Ray Jobs API without a trailing slash.

    Raises:
        ClusterError: `address` is not such a URL, or contains a password.
    """
    parts = urlsplit(address)
    if parts.username or parts.password or parts.query or not parts.hostname:
        raise ClusterError(
            "cluster.address must be the URL of Ray's dashboard, http://HOST:PORT, without user and password, because "
            "it is written to config.yaml. The token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token."
        )
    return address.rstrip("/")


def own_token() -> str | None:
    """Return this user's token for Ray from the places that Ray reads; None if there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    with contextlib.suppress(OSError):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        return path.read_text().strip() or None
    return None


class Jobs:
    """The Ray Jobs API of one cluster.

    Args:
        url: URL of the cluster's dashboard.
        token: the cluster's token, if it requires one.

    Raises:
        ClusterError: the API does not answer, or rejects the token.
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
        """Store `content` in the memory of the head, to be fetched with `take`.

        Raises:
            ClusterError: the request failed.
        """
        import requests

        address = self.url + kv.package_path(key)
        try:
            requests.put(address, data=content, headers=self._headers, timeout=REQUEST_SECONDS).raise_for_status()
        except requests.RequestException as error:
            raise refused(self.url, error) from None

    def submit(
        self, job: str, entrypoint: str, environment: Mapping[str, str], modules: Sequence[Path] = (), **more: Any
    ) -> None:
        """Start a job.

        Args:
            modules: local directories that are sent with the job, and importable by it and its workers.
            more: other fields of Ray's runtime environment.

        Raises:
            ClusterError: the request failed.
        """
        runtime: dict[str, Any] = {"env_vars": {**environment, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}, **more}
        if modules:
            runtime["py_modules"] = [str(path) for path in modules]
        try:
            self._client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=runtime)
        except Exception as error:
            raise refused(self.url, error) from None

    def status(self, job: str) -> str:
        """Return PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; GONE if the cluster has no such job.

        Raises:
            Unreachable: the API does not answer.
        """
        try:
            return str(self._client.get_job_status(job).value)
        except Exception as error:
            if "404" in str(error):
                return "GONE"
            raise Unreachable(_line(error)) from None

    def unfinished(self) -> list[str]:
        """Return the ids of the submitted jobs that have not ended. Raises Unreachable."""
        try:
            listed = self._client.list_jobs()
        except Exception as error:
            raise Unreachable(_line(error)) from None
        return [one.submission_id for one in listed if one.submission_id and str(one.status.value) not in OVER]

    def stop(self, job: str) -> None:
        """Send SIGTERM to the job, unless it has ended. Raises Unreachable."""
        try:
            self._client.stop_job(job)
        except Exception as error:
            if "404" not in str(error):
                raise Unreachable(_line(error)) from None

    def message(self, job: str) -> str:
        """Return Ray's message about the end of a job; empty if there is none."""
        with contextlib.suppress(Exception):
            return self._client.get_job_info(job).message or ""
        return ""

    def log(self, job: str) -> str:
        """Return the whole output of a job. Raises Unreachable."""
        try:
            return self._client.get_job_logs(job)
        except Exception as error:
            raise Unreachable(_line(error)) from None

    def tail(self, job: str, skip: int, pause: float = 0.5) -> Iterator[str | None]:
        """Yield the output of a job after its first `skip` characters until the job ends.

        None is yielded after each pause of `pause` seconds without output.

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
                unread, skip = text[skip:], max(0, skip - len(text))
                yield unread  # an empty text shows that the connection is alive
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
    """Return and delete the content that `Jobs.put` stored in the memory of the head; None if there is none.

    Args:
        address: HOST:PORT of the cluster's GCS.
    """
    with as_client():
        return kv.take_package(key, private.gcs_client(address))


def refused(url: str, error: Exception) -> ClusterError:
    """Return the error for a failed request to the Ray Jobs API, with a remedy."""
    line = _line(error)
    if "401" in line or "403" in line or "token" in line.lower():
        remedy = "Provide the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."
    else:
        remedy = "Check the address, and that Ray's dashboard is running (`ray start --head --dashboard-port=8265`)."
    return ClusterError(f"The Ray Jobs API at {url} could not be used: {line} {remedy}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".") + "."
