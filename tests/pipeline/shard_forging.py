"""Shard sets put together by hand: tar entries, PNG chunks, npy and zstandard bytes, and manifests that agree.

:data:`MUTATIONS` holds what the two modules of mutations register.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from tests.pipeline.sealed_manifests import parsed, sealed_json, with_crcs_of

Files = Mapping[str, bytes]
Random = np.random.Generator

BLOCK = 512
FIRST_SHARD, OTHER_SHARD = "train-000000.tar", "test-000000.tar"


@dataclass(frozen=True)
class Case:
    """A damaged set.

    Attributes:
        what: the choices that were drawn.
        files: name to bytes; None: removed.
        sealed: whether the manifest agrees with the bytes.
        refused: whether verification has to find it bad although it is sealed.
    """

    what: str
    files: dict[str, bytes | None]
    sealed: bool = False
    refused: bool = False


Mutation = Callable[[Random, Files], Case]
MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__.replace("_", "-")] = function
    return function


def choice(random: Random, options: Any) -> Any:
    items = list(options)
    return items[int(random.integers(len(items)))]


class TarEntries:
    """The entries of a plain tar."""

    def __init__(self, body: bytes):
        self.entries: list[tuple[bytes, bytes]] = []
        offset = 0
        while body[offset : offset + 1] != b"\0":
            header, size = body[offset : offset + BLOCK], int(body[offset + 124 : offset + 135], 8)
            padded = -(-size // BLOCK) * BLOCK
            self.entries.append((header, body[offset + BLOCK : offset + BLOCK + padded]))
            offset += BLOCK + padded

    def body(self) -> bytes:
        return b"".join(header + body for header, body in self.entries) + bytes(2 * BLOCK)

    def suffix(self, place: int) -> str:
        return self.name(place).partition(".")[2]

    def name(self, place: int) -> str:
        header = self.entries[place][0]
        folder, file = (header[a:b].rstrip(b"\0").decode("latin-1") for a, b in ((345, 500), (0, 100)))
        return f"{folder}/{file}" if folder else file

    def places(self) -> dict[str, list[int]]:
        """Name to (offset, size)."""
        found, offset = {}, 0
        for place, (header, body) in enumerate(self.entries):
            if header[156:157] == b"0":
                found[self.name(place)] = [offset + BLOCK, int(header[124:135], 8)]
            offset += BLOCK + len(body)
        return found


def sealed(
    files: Files, changed: dict[str, bytes], places: dict[str, list[int]] | None = None
) -> dict[str, bytes | None]:
    """The files with a manifest that agrees with them; ``places`` are those of the first shard's members."""
    document = parsed(files["manifest.json"])
    for shard in document["shards"]:
        body = changed.get(shard["name"], files[shard["name"]])
        shard["sha256"], shard["size_bytes"] = hashlib.sha256(body).hexdigest(), len(body)
        if places is not None and shard["name"] == FIRST_SHARD:
            for sample in shard["samples"]:
                for suffix in sample["members"]:
                    place = places.get(f"{sample['frame_id']}.{suffix}")
                    sample["members"][suffix] = [*(place or sample["members"][suffix])[:2], 0]
        with_crcs_of(shard, body)
    for name in document["files"]:
        document["files"][name] = hashlib.sha256(changed.get(name, files[name])).hexdigest()
    return {**changed, "manifest.json": sealed_json(document)}


def with_member(
    files: Files, random: Random, suffix: str, body: bytes, what: str, *, refused: bool, frame: str | None = None
) -> Case:
    """A set in which one member has another body, at a place of its right size."""
    shard = TarEntries(files[FIRST_SHARD])
    fitting = [place for place in range(len(shard.entries)) if shard.suffix(place) == suffix]
    if frame is not None:
        fitting = [place for place in fitting if shard.name(place).startswith(frame)]
    place = choice(random, fitting)
    header = bytearray(shard.entries[place][0])
    header[124:136] = b"%011o\0" % len(body)
    shard.entries[place] = (with_checksum(header), body + bytes(-len(body) % BLOCK))
    return Case(what, sealed(files, {FIRST_SHARD: shard.body()}, shard.places()), sealed=True, refused=refused)


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def of_size(header: bytes, other: bytes) -> bytes:
    changed = bytearray(header)
    changed[124:136] = other[124:136]
    return with_checksum(changed)


def entry(name: bytes, body: bytes, kind: bytes) -> tuple[bytes, bytes]:
    header = bytearray(BLOCK)
    header[0:100] = name.ljust(100, b"\0")
    for field in (slice(100, 108), slice(108, 116), slice(116, 124)):
        header[field] = b"0000644\0"
    header[124:136], header[136:148] = b"%011o\0" % len(body), b"0" * 11 + b"\0"
    header[156:157], header[257:265] = kind, b"ustar\00000"
    return with_checksum(header), body + bytes(-len(body) % BLOCK)


def pax_record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def npy(fields: bytes, data: bytes) -> bytes:
    fields += b" " * (-(len(fields) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(fields)) + fields + data


def zstd(body: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(body)


def zstd_of_size(body: bytes, declared: int) -> bytes:
    """A frame whose header says that it holds ``declared`` bytes."""
    if len(body) >= declared:
        return zstd(body)
    return b"\x28\xb5\x2f\xfd" + bytes([0xC0, 0x58]) + struct.pack("<Q", declared) + zstd(body)[6:]
