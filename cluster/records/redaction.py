"""What may be written into a tracking store: settings as flat parameters, with every secret taken out.

A secret is known by its name (a key such as ``aws_secret_access_key``) or by its value (the value of an
environment variable with such a name, or the password inside a URI).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"
SHORTEST_SECRET = 6

_SECRET_NAME = re.compile(
    r"(^|[_\-. ])(passw(or)?d|passphrase|secret|token|credentials?|access_?key(_?id)?|api_?key|private_?key|auth)"
    r"($|[_\-. ])",
    re.IGNORECASE,
)
_URI_PASSWORD = re.compile(r"(?P<start>[a-z][a-z0-9+.\-]*://[^/\s:@]*:)[^/\s@]+@", re.IGNORECASE)
# Variables whose names look secret but whose values are a word or a path, not a key.
_HARMLESS_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}


def is_secret_name(name: str) -> bool:
    """Whether a key of this name is taken for a credential: ``aws_secret_access_key`` is, ``keypoints`` is not."""
    return _SECRET_NAME.search(name) is not None


def redact_text(text: str) -> str:
    """``text`` without passwords in URIs and without the values of secret environment variables."""
    text = _URI_PASSWORD.sub(rf"\g<start>{REDACTED}@", text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and name not in _HARMLESS_VARIABLES and is_secret_name(name):
            text = text.replace(value, REDACTED)
    return text


def redact(settings: Any) -> Any:
    """A copy of nested mappings and lists in which secrets are replaced by ``"[redacted]"``."""
    if isinstance(settings, Mapping):
        return {
            str(key): REDACTED if is_secret_name(str(key)) and value is not None else redact(value)
            for key, value in settings.items()
        }
    if isinstance(settings, str):
        return redact_text(settings)
    if isinstance(settings, Sequence):
        return [redact(value) for value in settings]
    return settings


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"model.flow.steps": "4"}``; a list is one value, an empty mapping is ``"{}"``."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, prefix=f"{name}."))
        else:
            flat[name] = str(value)
    return flat
