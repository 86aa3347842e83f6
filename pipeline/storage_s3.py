"""The S3 side of :mod:`pipeline.storage`: the s3fs filesystem, its retries, and uploads that can be abandoned.

There is one layer of retries, ours: those of botocore and of s3fs are turned off, so that a failure is tried
``MAX_ATTEMPTS`` times and not that number cubed.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import tenacity

if TYPE_CHECKING:
    from s3fs import S3FileSystem

MAX_ATTEMPTS = 5
_MAX_WAIT_S = 10.0
_PART_BYTES = 16 * 2**20
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded", "InternalError",
     "ServiceUnavailable", "BandwidthLimitExceeded", "IncompleteBody", "RequestThrottled"}
)  # fmt: skip

_Result = TypeVar("_Result")


class ShortBodyError(OSError):
    """Fewer bytes came back than were promised."""


def retrying(call: Callable[[], _Result]) -> _Result:
    """Run ``call``, again on transient errors, at most ``MAX_ATTEMPTS`` times; the last error is raised."""
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(MAX_ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=_MAX_WAIT_S, jitter=0.2),
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )
    return attempts(call)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: throttling, server errors, resets, time-outs, short bodies."""
    if isinstance(error, ShortBodyError | ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.__cause__ is None:
        return False
    import aiohttp
    import botocore.exceptions as boto
    from fsspec.exceptions import FSTimeoutError

    for cause in (error, error.__cause__):
        if isinstance(cause, boto.ClientError):
            status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in _TRANSIENT_STATUS or cause.response.get("Error", {}).get("Code") in _TRANSIENT_CODES:
                return True
        network = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, aiohttp.ClientPayloadError)
        if isinstance(cause, (*network, FSTimeoutError, ConnectionError, TimeoutError)):
            return True
    return False


def s3_filesystem() -> S3FileSystem:
    """The filesystem for the present process and ``AWS_*`` environment; a change of either makes a new one."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _s3_filesystem(os.getpid(), environment)


@lru_cache(maxsize=4)
def _s3_filesystem(process_id: int, environment: tuple[tuple[str, str], ...]) -> S3FileSystem:
    from s3fs import S3FileSystem

    endpoint = dict(environment).get("AWS_ENDPOINT_URL") or None
    config: dict[str, Any] = {
        # botocore's default checksums break range reads on servers that return whole-object checksums
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 32,
        "read_timeout": 60,
    }
    if endpoint is not None:
        config["s3"] = {"addressing_style": "path"}
    filesystem = S3FileSystem(
        endpoint_url=endpoint,
        config_kwargs=config,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    filesystem.retries = 1
    return filesystem


@contextmanager
def open_upload(path: str) -> Iterator[IO[bytes]]:
    """A stream to ``bucket/key``; an error inside the block abandons the upload, parts included."""
    upload = _upload_class()(s3_filesystem(), path, "wb", block_size=_PART_BYTES)
    _open_uploads.add(upload)
    try:
        yield cast("IO[bytes]", upload)
        upload.close()
    except BaseException:
        _abandon(upload)
        raise
    finally:
        _open_uploads.discard(upload)


# Uploads in progress. An s3fs writer that is still open when the interpreter ends commits what it has, or hangs.
_open_uploads: set[Any] = set()


def _abandon(upload: Any) -> None:
    upload.closed = True
    upload.discard()


@atexit.register
def _forget_open_uploads() -> None:
    """The network is gone at exit: the parts sent so far are left to the bucket's clean-up, as after a kill."""
    for upload in _open_uploads:
        upload.closed = True
        upload.mpu = None


@lru_cache(maxsize=1)
def _upload_class() -> type:
    from s3fs.core import S3File

    class RetriedUpload(S3File):
        """An s3fs upload whose single requests are retried."""

        def _call_s3(self, method: str, *settings: Any, **arguments: Any) -> Any:
            request = super()._call_s3
            return retrying(lambda: request(method, *settings, **arguments))

    return RetriedUpload


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
