"""JSON documents that carry a checksum of themselves: no flipped bit in them is taken for a fact.

The last key of a sealed document is ``checksum``: the SHA-256 of the bytes of the document without it. It covers bytes
and not values, so that any reader can compare it without agreeing on how a number is written, and before it parses.
"""

from __future__ import annotations

import hashlib
import re

from lipflow.errors import ShardSetError

_SEAL = re.compile(rb',"checksum":"([0-9a-f]{64})"\}')
_SEAL_BYTES = len(b',"checksum":""}') + 64


class ChecksumError(ShardSetError):
    """A document, or a member of a shard, that is not what was written."""


def seal(document: bytes) -> bytes:
    """The bytes of a JSON object, one key at least and no space at its end, with their checksum."""
    return document[:-1] + b',"checksum":"' + _checksum(document) + b'"}'


def unseal(sealed: bytes, source: str) -> bytes:
    """The document without its checksum, which is compared.

    Args:
        sealed: what was read.
        source: where, for the error.

    Raises:
        ChecksumError: there is no checksum, or it is one of other bytes.
    """
    found = _SEAL.fullmatch(sealed[-_SEAL_BYTES:])
    if found is None:
        raise ChecksumError(f"{source}: does not end with its checksum, cut off or changed; fetch it or shard again")
    document = sealed[:-_SEAL_BYTES] + b"}"
    actual = _checksum(document)
    if actual != found[1]:
        raise ChecksumError(
            f"{source}: SHA-256 {actual[:12].decode()}…, but its checksum says {found[1][:12].decode()}…: it was"
            " damaged or changed since it was written; fetch it or shard again"
        )
    return document


def _checksum(document: bytes) -> bytes:
    return hashlib.sha256(document).hexdigest().encode()
