"""Copies of shards are compared with their digest while they are fetched, and appear only if it is theirs."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lipflow.errors import ShardSetError
from pipeline import storage
from pipeline.loading.cache import ShardCache, ShardCheck
from pipeline.manifest import ShardRecord
from pipeline.storage import s3_streams

_PART_BYTES = 3 * s3_streams._DIGEST_BYTES
_BODY = random.Random(11).randbytes(4 * _PART_BYTES - 12345)
_SHA256 = hashlib.sha256(_BODY).hexdigest()
_SHARD = ShardRecord(name="train-000000.tar", sha256=_SHA256, size_bytes=len(_BODY), split="train", samples=())

CopyRange = Callable[[str, int, int, str, int], None]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[CopyRange], None]:
    """Have an object of the size of ``_BODY`` fetched by four ranges, all at a time, each by the given function."""
    monkeypatch.setattr(s3_streams, "_PART_BYTES", _PART_BYTES)
    monkeypatch.setattr(s3_streams, "head_object", lambda path: (len(_BODY), "etag"))
    return lambda copy_range: monkeypatch.setattr(s3_streams, "copy_range", copy_range)


def _copy(path: str, offset: int, length: int, etag: str, descriptor: int) -> None:
    os.pwrite(descriptor, _BODY[offset : offset + length], offset)


def _copy_in_order(order: tuple[int, ...]) -> CopyRange:
    """Each range waits for the one before it in ``order``."""
    arrived = [threading.Event() for _ in order]
    before = {later: arrived[sooner] for sooner, later in itertools.pairwise(order)}

    def copy(path: str, offset: int, length: int, etag: str, descriptor: int) -> None:
        place = offset // _PART_BYTES
        assert place not in before or before[place].wait(10)
        _copy(path, offset, length, etag, descriptor)
        arrived[place].set()

    return copy


def test_the_digest_is_right_in_whatever_order_the_ranges_arrive(served: Callable[[CopyRange], None], tmp_path: Path):
    for order in itertools.permutations(range(4)):
        served(_copy_in_order(order))
        storage.download("s3://bucket/key", tmp_path / "copy", sha256=_SHA256)
        assert (tmp_path / "copy").read_bytes() == _BODY
        (tmp_path / "copy").unlink()


def test_a_range_that_is_tried_again_counts_once(served: Callable[[CopyRange], None], tmp_path: Path):
    """The first try leaves other bytes in its place, as a short body does."""

    def copy(path: str, offset: int, length: int, etag: str, descriptor: int) -> None:
        os.pwrite(descriptor, bytes(length // 2), offset)
        _copy(path, offset, length, etag, descriptor)

    served(copy)
    storage.download("s3://bucket/key", tmp_path / "copy", sha256=_SHA256)
    assert (tmp_path / "copy").read_bytes() == _BODY


@pytest.mark.parametrize("place", [0, _PART_BYTES - 1, 2 * _PART_BYTES, len(_BODY) - 1])
def test_a_byte_that_changes_on_its_way_is_refused_and_leaves_nothing(
    served: Callable[[CopyRange], None], tmp_path: Path, place: int
):
    def copy(path: str, offset: int, length: int, etag: str, descriptor: int) -> None:
        _copy(path, offset, length, etag, descriptor)
        if offset <= place < offset + length:
            os.pwrite(descriptor, bytes([_BODY[place] ^ 1]), place)

    served(copy)
    with pytest.raises(storage.OtherBytesError, match=r"s3://bucket/train-000000\.tar: SHA-256"):
        storage.download("s3://bucket/train-000000.tar", tmp_path / "copy", sha256=_SHA256)
    cache = ShardCache("s3://bucket", tmp_path, max_bytes=2**30)
    with pytest.raises(ShardSetError, match=r"train-000000\.tar: its bytes do not match the manifest"):
        cache.ensure(_SHARD)
    assert list(tmp_path.iterdir()) == []
    served(_copy)
    assert cache.ensure(_SHARD).read_bytes() == _BODY


def test_a_copy_of_a_local_object_is_compared_as_well(tmp_path: Path):
    (tmp_path / "object").write_bytes(_BODY)
    storage.download(tmp_path / "object", tmp_path / "copy", sha256=_SHA256)
    with pytest.raises(storage.OtherBytesError, match="expected 0000"):
        storage.download(tmp_path / "object", tmp_path / "other", sha256="0" * 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "object"]


@pytest.mark.parametrize(
    ("check", "found"),
    [("once", _BODY[:-1] + b"\0"), ("once", b"short"), ("size", b"short")],
    ids=["another byte", "short", "short, size alone"],
)
def test_a_copy_that_another_process_left_is_checked_and_removed_if_it_is_damaged(
    served: Callable[[CopyRange], None], tmp_path: Path, check: ShardCheck, found: bytes
):
    served(_copy)
    cache = ShardCache("s3://bucket", tmp_path, max_bytes=2**30, check=check)
    (tmp_path / f"{_SHA256}.shard").write_bytes(found)
    with pytest.raises(ShardSetError, match=f"its {len(found)} bytes do not match"):
        cache.ensure(_SHARD)
    assert list(tmp_path.iterdir()) == []
    assert cache.ensure(_SHARD).read_bytes() == _BODY


def test_where_sizes_alone_are_compared_that_of_a_fetched_copy_is(
    served: Callable[[CopyRange], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    served(_copy)
    monkeypatch.setattr(s3_streams, "head_object", lambda path: (len(_BODY) - 5, "etag"))
    cache = ShardCache("s3://bucket", tmp_path, max_bytes=2**30, check="size")
    with pytest.raises(ShardSetError, match=f"its {len(_BODY) - 5} bytes do not match"):
        cache.ensure(_SHARD)
    assert list(tmp_path.iterdir()) == []
