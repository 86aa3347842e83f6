"""Manifests that are changed by hand and sealed again, so that what lies behind the checksum is reached."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from pipeline.sealing import seal


def parsed(manifest: bytes) -> dict[str, Any]:
    """The document without its checksum."""
    document = json.loads(manifest)
    del document["checksum"]
    return document


def sealed_json(document: Any) -> bytes:
    return seal(json.dumps(document).encode("utf-8", "surrogatepass"))


def read_manifest(folder: Path) -> dict[str, Any]:
    return parsed((folder / "manifest.json").read_bytes())


def write_manifest(folder: Path, document: Any) -> None:
    (folder / "manifest.json").write_bytes(sealed_json(document))


def with_crcs_of(shard: dict[str, Any], body: bytes) -> None:
    """Make the CRC-32s of a shard's members those of the bytes at their places."""
    for sample in shard["samples"]:
        for place in sample["members"].values():
            place[2] = zlib.crc32(body[place[0] : place[0] + place[1]])
