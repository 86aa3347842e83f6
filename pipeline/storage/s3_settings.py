"""What an S3 server needs, by its endpoint, and how patiently it is asked.

**Settings.** What suits a server follows from its endpoint (:func:`settings_for_endpoint`); the endpoint comes from
``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or ``endpoint_url`` of the profile, and credentials from botocore's
chain (environment, profile, container and instance metadata). Four variables change what has a default:

==================================  =======  ======================================================================
``LIPFLOW_S3_MAX_ATTEMPTS``         7        tries of each request, the first included
``LIPFLOW_S3_MAX_WAIT_S``           10       bound of a single wait; waits grow as 0.2, 0.4, 0.8, ... s, half of each
                                             is drawn at random
``LIPFLOW_S3_READ_TIMEOUT_S``       30       silence of a server after which a request has failed
``LIPFLOW_S3_ADDRESSING_STYLE``     --       ``path`` or ``virtual``, for a server that is not in the table
==================================  =======  ======================================================================

**Bound.** Against a server that answers every request with an error an operation fails after
:attr:`RetrySettings.longest_wait_s` (12.6 s by default) of waiting; against one that stays silent after that and
``max_attempts`` times the read time-out (225 s); no single request
takes longer than :data:`pipeline.storage.s3.REQUEST_TIMEOUT_S`. Writing a large object doubles this, as its parts are
removed after the failure.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from lipflow.errors import StorageError

FIRST_WAIT_S = 0.2
_AWS_DOMAINS = ("amazonaws.com", "amazonaws.com.cn", "api.aws")
_VIRTUAL_ONLY_DOMAINS = ("aliyuncs.com", "myqcloud.com")


@dataclass(frozen=True)
class RetrySettings:
    """How often and how patiently a request is tried again."""

    max_attempts: int
    max_wait_s: float

    @classmethod
    def from_environment(cls) -> RetrySettings:
        """From ``LIPFLOW_S3_MAX_ATTEMPTS`` and ``LIPFLOW_S3_MAX_WAIT_S``.

        Raises:
            StorageError: a variable holds no number, or one out of range.
        """
        return cls(
            int(number_from_environment("LIPFLOW_S3_MAX_ATTEMPTS", 7, least=1, kind=int)),
            number_from_environment("LIPFLOW_S3_MAX_WAIT_S", 10.0, least=0),
        )

    @property
    def longest_wait_s(self) -> float:
        """The sum of all waits between the attempts at one request, at its largest."""
        return sum(min(FIRST_WAIT_S * 2**turn, self.max_wait_s) for turn in range(self.max_attempts - 1))


@dataclass(frozen=True)
class EndpointSettings:
    """What a server needs.

    Attributes:
        addressing_style: ``virtual``: the bucket stands in the host's name; ``path``: in the path.
        checksums: botocore's mode. Beyond AWS only what an operation requires: many servers refuse the headers, or
            answer a range with the checksum of the whole object.
    """

    addressing_style: str
    checksums: str


def settings_for_endpoint(endpoint: str | None) -> EndpointSettings:
    """AWS: virtual hosts and all checksums. Alibaba and Tencent: virtual hosts, which they demand. Else: paths.

    Raises:
        StorageError: the endpoint is no ``http://`` or ``https://`` address, or the style asked for is none.
    """
    style = os.environ.get("LIPFLOW_S3_ADDRESSING_STYLE", "")
    if style not in ("", "path", "virtual"):
        raise StorageError(f"LIPFLOW_S3_ADDRESSING_STYLE={style}: expected path or virtual")
    if endpoint is None:
        return EndpointSettings(style or "virtual", "when_supported")
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise StorageError(f"AWS_ENDPOINT_URL={endpoint}: expected http://HOST:PORT or https://HOST")
    if _is_under(address.hostname, _AWS_DOMAINS):
        return EndpointSettings(style or "virtual", "when_supported")
    virtual = _is_under(address.hostname, _VIRTUAL_ONLY_DOMAINS)
    return EndpointSettings(style or ("virtual" if virtual else "path"), "when_required")


def configured_endpoint() -> str | None:
    """The endpoint by the standard chain, environment before profile; None: AWS itself."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if os.environ.get(name):
            return os.environ[name]
    from botocore.session import Session

    session = Session()
    profile = session.get_scoped_config()
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    return services.get("s3", {}).get("endpoint_url") or profile.get("endpoint_url")


def number_from_environment(
    variable: str, default: float, *, least: float, kind: type[int] | type[float] = float
) -> float:
    """What a variable of the environment holds, or the default.

    Raises:
        StorageError: it holds no number, or one that is too small.
    """
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value < float("inf"):
        what = "a whole number" if kind is int else "a number"
        raise StorageError(f"{variable}={text}: expected {what} of at least {least}")
    return value


def _is_under(host: str, domains: tuple[str, ...]) -> bool:
    return any(host == domain or host.endswith("." + domain) for domain in domains)
