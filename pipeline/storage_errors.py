"""What went wrong with storage, and what to do about it, in one line."""

from __future__ import annotations

import os

from pipeline.storage_s3 import is_transient, one_line


def explain(uri: str, action: str, error: Exception) -> str | None:
    """Why the action failed and what to do about it; None if the error is not about storage."""
    if uri.startswith("s3://"):
        return _explain_s3(uri, action, error)
    if not isinstance(error, OSError):
        return None
    what = f"cannot {action} it ({error.strerror or one_line(error)})"
    if isinstance(error, FileNotFoundError) and action != "write":
        return "no such file or folder; check the path"
    if action == "write":
        return f"{what}; choose a folder that you may write to and that has room"
    return f"{what}; check the path and its permissions"


def _explain_s3(uri: str, action: str, error: Exception) -> str | None:
    from botocore.exceptions import (  # a local job must not pay for the import of botocore
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    bucket = uri.removeprefix("s3://").split("/")[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "the AWS endpoint")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return (
            f"no S3 credentials for bucket {bucket!r}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            " (and AWS_ENDPOINT_URL for a server other than AWS)"
        )
    cause = error if isinstance(error, ClientError) else error.__cause__
    code = cause.response.get("Error", {}).get("Code") if isinstance(cause, ClientError) else None
    if code == "NoSuchBucket":
        return f"no such bucket {bucket!r} at {endpoint}; create it or correct the address"
    if isinstance(error, FileNotFoundError):
        return f"nothing is there (asked {endpoint}); check bucket and key"
    if isinstance(error, PermissionError):
        return (
            f"not allowed to {action} in bucket {bucket!r} ({one_line(error)});"
            " check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
        )
    if is_transient(error):
        return f"cannot {action} it after several tries ({one_line(error)}); is {endpoint} up and reachable?"
    if isinstance(error, OSError | BotoCoreError | ClientError):
        return f"cannot {action} it ({one_line(error)}); check AWS_ENDPOINT_URL and the bucket"
    return None
