"""The S3 side of :mod:`pipeline.storage`: single requests, each retried by itself.

Requests go through the client of an s3fs filesystem, set up by :mod:`pipeline.storage.s3_settings`. A listing of a
hundred pages or a shard of a hundred ranges does not begin anew because one of its requests failed. There is one
layer of retries, ours; those of botocore and of s3fs are off, so that a request is tried ``max_attempts`` times and
not that number cubed. (When a connection breaks before the answer, aiohttp sends the request again at once, a
single time, within the same attempt.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tenacity

from lipflow.errors import StorageError
from pipeline.storage.s3_settings import (
    FIRST_WAIT_S,
    RetrySettings,
    configured_endpoint,
    number_from_environment,
    settings_for_endpoint,
)

if TYPE_CHECKING:
    from s3fs import S3FileSystem

REQUEST_TIMEOUT_S = 300.0
"""After so long a request has failed even if bytes still trickle in."""

_CONNECT_TIMEOUT_S = 10
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "RequestLimitExceeded", "InternalError",
     "ServiceUnavailable", "BandwidthLimitExceeded", "IncompleteBody", "RequestThrottled"}
)  # fmt: skip

_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


class ShortBodyError(OSError):
    """Fewer bytes came back than were promised."""


class EndOfObjectError(OSError):
    """An object has fewer bytes than were asked for; asking again does not help."""


def retrying(call: Callable[[], _Result]) -> _Result:
    """Run ``call``, again on transient errors, as often as :class:`RetrySettings` says; the last error is raised."""
    try:
        return call()
    except Exception as error:
        if not is_transient(error):
            raise
        failed = [error]

    def next_attempt() -> _Result:
        # The loop below costs more than a read from a local disk: it is entered with the first failure in hand.
        if failed:
            raise failed.pop()
        return call()

    settings = RetrySettings.from_environment()
    half_s = {"multiplier": FIRST_WAIT_S / 2, "max": settings.max_wait_s / 2}
    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(settings.max_attempts),
        wait=tenacity.wait_exponential(**half_s) + tenacity.wait_random_exponential(**half_s),
        retry=tenacity.retry_if_exception(is_transient),
        before_sleep=tenacity.before_sleep_log(_logger, logging.DEBUG),
        reraise=True,
    )
    return attempts(next_attempt)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: throttling, server errors, resets, time-outs, short bodies."""
    if isinstance(error, ShortBodyError | ConnectionError | TimeoutError):
        return True
    plain = isinstance(error, EndOfObjectError) or type(error).__module__ == "builtins"
    if isinstance(error, OSError) and plain and error.__cause__ is None:
        return False  # a file's: botocore, whose time-outs are OSErrors as well, need not be imported
    import aiohttp
    import botocore.exceptions as boto
    from botocore.parsers import ResponseParserError

    for cause in (error, error.__cause__):
        if isinstance(cause, boto.ClientError):
            status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in _TRANSIENT_STATUS or error_code(cause) in _TRANSIENT_CODES:
                return True
        network = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, aiohttp.ClientPayloadError)
        if isinstance(cause, (*network, ResponseParserError, ConnectionError, TimeoutError)):
            return True
    return False


def error_code(error: BaseException | None) -> str | None:
    """S3's code of what a server answered, such as ``NoSuchKey``; None if it is no such error."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def s3_filesystem(*, for_libraries: bool = False) -> S3FileSystem:
    """The filesystem for the present process and environment; a change of either makes a new one.

    Args:
        for_libraries: one that retries by itself, by botocore's standard mode, for code that is not ours.
    """
    return _s3_filesystem(os.getpid(), s3_environment(), for_libraries)


def s3_environment() -> tuple[tuple[str, str], ...]:
    """The variables on which a client depends."""
    names = ("AWS_", "LIPFLOW_S3_")
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith(names)))


def client_settings(endpoint: str | None) -> dict[str, Any]:
    """The arguments of botocore's ``Config`` for a server: each request is tried once."""
    server = settings_for_endpoint(endpoint)
    return {
        "s3": {"addressing_style": server.addressing_style},
        "request_checksum_calculation": server.checksums,
        "response_checksum_validation": server.checksums,
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 64,
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": number_from_environment("LIPFLOW_S3_READ_TIMEOUT_S", 30.0, least=0.001),
    }


def get_object(path: str) -> bytes:
    """The whole object at ``bucket/key``, by one request."""
    return retrying(lambda: on_loop(path, _get))


def get_range(path: str, offset: int, length: int, etag: str | None = None) -> bytes:
    """``length > 0`` bytes from ``offset`` on, by one request; with ``etag`` only if the object is still that one."""
    return retrying(lambda: on_loop(path, _get, offset, length, etag))


def put_object(path: str, body: bytes) -> None:
    """Write a whole object by one request."""
    request("put_object", path, Body=body)


def delete_object(path: str) -> None:
    """Remove an object."""
    request("delete_object", path)


def head_object(path: str) -> tuple[int, str]:
    """Size in bytes and ETag."""
    facts = request("head_object", path)
    return int(facts["ContentLength"]), facts["ETag"]


def list_pages(bucket: str, prefix: str, **settings: Any) -> Iterator[dict[str, Any]]:
    """The pages of a listing, at most 1,000 entries each; every page is retried by itself."""
    while True:
        page = request("list_objects_v2", bucket, Prefix=prefix, **settings)
        yield page
        if not page.get("IsTruncated"):
            return
        if not page.get("NextContinuationToken"):
            raise StorageError(f"s3://{bucket}/{prefix}: a listing was cut without a way to go on; check the server")
        settings["ContinuationToken"] = page["NextContinuationToken"]


def request(method: str, path: str, **arguments: Any) -> dict[str, Any]:
    """A request whose answer is no stream of bytes; retried."""
    return cast("dict[str, Any]", retrying(partial(on_loop, path, send_once, method, arguments)))


def on_loop(path: str, send: Callable[..., Awaitable[_Result]], *arguments: Any) -> _Result:
    """Run ``send(client, {"Bucket": ..., "Key": ...}, *arguments)`` in the filesystem's event loop."""
    from fsspec.asyn import sync

    filesystem = s3_filesystem()
    bucket, _, key = path.partition("/")
    place = {"Bucket": bucket, "Key": key} if key else {"Bucket": bucket}

    async def bounded() -> _Result:
        await filesystem.set_session()
        client = await filesystem.get_s3(bucket)
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            return await send(client, place, *arguments)

    return cast("_Result", sync(filesystem.loop, bounded))


async def send_once(client: Any, place: dict[str, str], method: str, arguments: dict[str, Any]) -> Any:
    """For :func:`on_loop`: one request, one attempt."""
    return await getattr(client, method)(**place, **arguments)


async def _get(
    client: Any, place: dict[str, str], offset: int = 0, length: int | None = None, etag: str | None = None
) -> bytes:
    arguments = dict(place)
    if length is not None:
        arguments["Range"] = f"bytes={offset}-{offset + length - 1}"
    if etag:
        arguments["IfMatch"] = etag
    response = await client.get_object(**arguments)
    try:
        if length is not None:
            check_range(response.get("ContentRange"), place, offset, length)
        body = cast("bytes", await response["Body"].read())
    finally:
        response["Body"].close()
    expected = response.get("ContentLength") if length is None else length
    if expected is not None and len(body) != expected:
        raise ShortBodyError(f"{len(body)} bytes came back, expected {expected} from offset {offset}")
    return body


def check_range(content_range: str | None, place: dict[str, str], offset: int, length: int) -> None:
    """Compare ``bytes FIRST-LAST/TOTAL`` with what was asked, before any of it is read."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range or "")
    if match is None or int(match[1]) != offset:
        raise StorageError(
            f"s3://{place['Bucket']}/{place['Key']}: asked for bytes from {offset} on, the server sends"
            f" {content_range or 'the whole object'}; use a server that honours Range requests"
        )
    if match[3] != "*" and int(match[3]) < offset + length:
        raise EndOfObjectError(f"it ends at byte {match[3]}, expected {length} bytes from {offset} on")


@lru_cache(maxsize=8)
def _s3_filesystem(process_id: int, environment: tuple[tuple[str, str], ...], for_libraries: bool) -> S3FileSystem:
    from s3fs import S3FileSystem

    endpoint = configured_endpoint()
    config = client_settings(endpoint)
    if for_libraries:
        config["retries"] = {"mode": "standard", "total_max_attempts": RetrySettings.from_environment().max_attempts}
    return S3FileSystem(endpoint_url=endpoint, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
