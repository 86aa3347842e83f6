"""What of the submitter's environment and command line goes with a job: nothing secret.

Ray keeps a job's runtime environment and its command line in its job records, in clear, where everybody who may see
the dashboard reads them. So secrets are never sent. They belong into the environment of the cluster's own nodes: the
shell that runs ``ray start``, or a Kubernetes secret that its pods take their environment from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.records.redaction import is_secret_name, redact_text
from lipflow.errors import ConfigError

SENT_VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
)
"""Sent if they are set, and every variable that begins with :data:`SENT_PREFIX`."""

SENT_PREFIX = "LIPFLOW_"
_NOT_SENT = ("LIPFLOW_STACK_",)
"""What they say is of this machine only."""

_MISSED_BY_JOBS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
WHERE_SECRETS_BELONG = (
    "what is sent stands in Ray's job records in clear: give secrets to the cluster's own nodes (the shell that runs "
    "`ray start`, or a Kubernetes secret as their environment)"
)


@dataclass(frozen=True)
class SentEnvironment:
    """What goes with the job.

    Attributes:
        variables: name -> value.
        held_back: names of what is set here, is of use to jobs, and is secret.
    """

    variables: Mapping[str, str]
    held_back: tuple[str, ...]


def environment_to_send(environment: Mapping[str, str], asked_for: Sequence[str] = ()) -> SentEnvironment:
    """The variables that go with a job.

    Args:
        environment: the submitter's.
        asked_for: further ones, ``NAME`` (its value here) or ``NAME=VALUE``.

    Raises:
        ConfigError: one that was asked for is secret, or is not set.
    """
    variables: dict[str, str] = {}
    held_back = [name for name in _MISSED_BY_JOBS if environment.get(name)]
    for name, value in environment.items():
        wanted = name in SENT_VARIABLES or (name.startswith(SENT_PREFIX) and not name.startswith(_NOT_SENT))
        if wanted and value:
            if _is_secret(name, value):
                held_back.append(name)
            else:
                variables[name] = value
    for item in asked_for:
        name, given, value = item.partition("=")
        if not given:
            if name not in environment:
                raise ConfigError(f"--env {name}: it is not set here; set it, or write --env {name}=VALUE")
            value = environment[name]
        if _is_secret(name, value):
            raise ConfigError(f"--env {name}: by its name or value it is a secret, and {WHERE_SECRETS_BELONG}")
        variables[name] = value
    return SentEnvironment(variables, tuple(sorted(held_back)))


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse a command line that holds a secret.

    Raises:
        ConfigError: one of the arguments is one, or names a setting that is one.
    """
    for place, argument in enumerate(arguments, start=1):
        name, assigned, value = argument.partition("=")
        secret_setting = assigned and value and is_secret_name(name.removeprefix("--"))
        if secret_setting or redact_text(argument) != argument:
            raise ConfigError(f"argument {place} of the job holds a secret, and {WHERE_SECRETS_BELONG}")


def _is_secret(name: str, value: str) -> bool:
    return is_secret_name(name) or redact_text(value) != value
