"""What went wrong with storage, and what to do about it, in one line."""

from __future__ import annotations

from pipeline.storage.s3 import EndOfObjectError, error_code, is_transient, one_line
from pipeline.storage.s3_settings import RetrySettings, configured_endpoint

# A HEAD has no body: its errors carry the status for a code, and an expired token is no more than a bad request.
_NOT_FOUND_CODES = frozenset({"NoSuchKey", "NoSuchBucket", "NotFound", "404"})
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "400"})
_CLOCK_CODES = frozenset({"RequestTimeTooSkewed"})
_REGION_CODES = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
)
_FORBIDDEN_CODES = frozenset(
    {
        "AccessDenied",
        "Forbidden",
        "403",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "AccountProblem",
        "InvalidToken",
    }
)
_CHANGED_CODES = frozenset({"PreconditionFailed", "412"})
_RANGE_CODES = frozenset({"InvalidRange", "416"})


def explain(uri: str, action: str, error: Exception) -> str | None:
    """Why the action failed and what to do about it; None if the error is not about storage."""
    if uri.startswith("s3://"):
        return _explain_s3(uri, action, error)
    if not isinstance(error, OSError):
        return None
    if isinstance(error, EndOfObjectError):
        return f"{_cannot(action)} ({one_line(error)}); it was cut or changed, write it again"
    what = f"{_cannot(action)} ({error.strerror or one_line(error)})"
    if isinstance(error, FileNotFoundError) and action != "write":
        return "no such file or folder; check the path"
    if action == "write":
        return f"{what}; choose a folder that you may write to and that has room"
    return f"{what}; check the path and its permissions"


def is_not_found(error: Exception) -> bool:
    """Whether the error says that an object, a file or a bucket is not there."""
    return isinstance(error, FileNotFoundError) or error_code(error) in _NOT_FOUND_CODES


def _explain_s3(uri: str, action: str, error: Exception) -> str | None:
    from botocore.exceptions import (  # a local job must not pay for the import of botocore
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.parsers import ResponseParserError

    bucket = uri.removeprefix("s3://").split("/")[0]
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return (
            f"no S3 credentials for bucket {bucket!r} at {_endpoint()}; set AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (and AWS_ENDPOINT_URL for a server other than AWS)"
        )
    code = error_code(error) or error_code(error.__cause__)
    if code == "NoSuchBucket":
        return f"no such bucket {bucket!r} at {_endpoint()}; create it or correct the address"
    if is_not_found(error):
        return f"nothing is there (asked {_endpoint()}); check bucket and key"
    if code in _EXPIRED_CODES:
        return f"the credentials for bucket {bucket!r} at {_endpoint()} have expired ({code}); fetch new ones"
    if code in _CLOCK_CODES:
        return f"{_endpoint()} refuses the time of this machine ({code}); set its clock"
    if code in _REGION_CODES:
        return f"bucket {bucket!r} lies in another region than the one asked ({code}); set AWS_DEFAULT_REGION"
    if isinstance(error, PermissionError) or code in _FORBIDDEN_CODES:
        return (
            f"not allowed to {action} in bucket {bucket!r} at {_endpoint()} ({one_line(error)});"
            " check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
        )
    if code in _CHANGED_CODES:
        return f"it was changed while it was read from {_endpoint()}; read it again once the writer is done"
    if isinstance(error, EndOfObjectError) or code in _RANGE_CODES:
        return f"{_cannot(action)} ({one_line(error)}); it was cut or changed, write it again"
    if is_transient(error):
        return (
            f"{_cannot(action)} after {_attempts(RetrySettings.from_environment().max_attempts)} at {_endpoint()}"
            f" ({one_line(error)}); is that server up and reachable from here?"
            " LIPFLOW_S3_MAX_ATTEMPTS sets how often it is asked"
        )
    if isinstance(error, OSError | BotoCoreError | ClientError | ResponseParserError):
        return f"{_cannot(action)} at {_endpoint()} ({one_line(error)}); check AWS_ENDPOINT_URL and the bucket"
    return None


def _cannot(action: str) -> str:
    return "cannot look it up" if action == "look up" else f"cannot {action} it"


def _endpoint() -> str:
    from botocore.exceptions import BotoCoreError

    try:
        return configured_endpoint() or "the AWS endpoint"
    except BotoCoreError:  # the profile that would name it cannot be read, which is then the error that is explained
        return "the AWS endpoint"


def _attempts(count: int) -> str:
    return "1 attempt" if count == 1 else f"{count} attempts"
