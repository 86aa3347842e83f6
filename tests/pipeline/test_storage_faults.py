"""Storage under faults: a tenth of the requests disturbed changes nothing; all of them disturbed ends clearly."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lipflow.errors import StorageError
from lipflow.types import FrameBatch
from pipeline import storage
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.loading.loader import LoaderConfig, ShardLoader
from pipeline.loading.shardset import ShardSet
from pipeline.sharding.shards import ShardConfig, write_shards
from pipeline.storage import s3 as storage_s3
from pipeline.storage.s3_settings import RetrySettings
from tests.pipeline.fault_proxy import FAULTS, FaultProxy, fault_proxy

DOME = DomeConfig(
    cameras=3,
    image_size_hw=(32, 24),
    texture_size=16,
    segments=4,
    frames_per_segment=2,
    headset_image_size_hw=(16, 20),
    supersampling=1,
)
SHARDS = ShardConfig(frames_per_shard=2)
LOADER = LoaderConfig(frames_per_batch=2, views_per_frame=2, decode_threads=2)


@pytest.fixture
def proxy(s3_server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between this test and the server; no request is disturbed until the test says so."""
    with fault_proxy(s3_server.endpoint, share=0.0, seed=7) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture(scope="module")
def capture_uri(s3_server) -> str:
    """A small capture on S3."""
    uri = s3_server.uri("fault-capture")
    write_dome(DOME, uri)
    return uri


@pytest.fixture(scope="module")
def shards_uri(s3_server, capture_uri: str) -> str:
    """Its shard set, written without disturbance."""
    uri = s3_server.uri("fault-shards")
    write_shards(open_capture(capture_uri), SHARDS, uri)
    return uri


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> RetrySettings:
    """Four attempts, at most 0.1 s apart."""
    monkeypatch.setenv("LIPFLOW_S3_MAX_ATTEMPTS", "4")
    monkeypatch.setenv("LIPFLOW_S3_MAX_WAIT_S", "0.1")
    return RetrySettings.from_environment()


def _digests(uri: str) -> dict[str, str]:
    return {name: storage.sha256_hex(storage.join(uri, name)) for name in storage.listdir(uri)}


def _batch_digest(batch: FrameBatch) -> tuple[tuple[str, ...], str]:
    digest = hashlib.sha256()
    tensors = [batch.vertices, batch.average_texture, batch.images, batch.view_present, batch.camera_index]
    for tensor in [*tensors, batch.driving.hmc_images, batch.driving.keypoints]:
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.contiguous().numpy().tobytes())
    return tuple(batch.frame_ids), digest.hexdigest()


def _epoch(uri: str, folder: object) -> list[tuple[tuple[str, ...], str]]:
    shard_set = ShardSet.open(uri)
    loader = ShardLoader(shard_set, "train", shard_set.train_camera_ids, LOADER, cache_dir=str(folder))
    return [_batch_digest(batch) for batch in loader.epoch(0)]


def _all_frames(uri: str) -> tuple[tuple[str, ...], str]:
    shard_set = ShardSet.open(uri)
    return _batch_digest(shard_set.frames(shard_set.frame_ids("train"), shard_set.train_camera_ids))


def test_an_undisturbed_request_passes_the_proxy_with_its_signature(proxy: FaultProxy, s3_server):
    """The signature covers the Host header, which names the proxy."""
    uri = s3_server.uri("through-the-proxy")
    storage.write_bytes(uri, b"body")
    assert storage.read_bytes(uri) == b"body"
    assert proxy.requests == {"PUT": 1, "GET": 1}


def test_shards_written_with_a_tenth_of_the_requests_disturbed_are_byte_identical(
    proxy: FaultProxy, s3_server, capture_uri: str, shards_uri: str
):
    proxy.share = 0.1
    target = s3_server.uri("fault-shards-disturbed")
    write_shards(open_capture(capture_uri), SHARDS, target)
    proxy.share = 0.0
    assert _digests(target) == _digests(shards_uri)
    assert set(proxy.injected) == set(FAULTS)


def test_an_epoch_and_random_access_with_a_tenth_of_the_requests_disturbed_are_equal(
    proxy: FaultProxy, shards_uri: str, tmp_path
):
    expected = _epoch(shards_uri, tmp_path / "quiet"), _all_frames(shards_uri)
    proxy.share = 0.1
    for turn in range(4):
        assert (_epoch(shards_uri, tmp_path / f"disturbed-{turn}"), _all_frames(shards_uri)) == expected
    assert proxy.injected.total() >= 3


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_survived_by_large_objects(
    proxy: FaultProxy, s3_server, fault: str, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    """34 MiB: three parts up, three ranges down, with half of the requests disturbed."""
    monkeypatch.setenv("LIPFLOW_S3_MAX_ATTEMPTS", "12")
    monkeypatch.setenv("LIPFLOW_S3_MAX_WAIT_S", "0.05")
    proxy.share, proxy.faults, proxy.stall_s = 0.5, (fault,), 0.1
    uri, body = s3_server.uri("large", fault.replace(" ", "-")), random.Random(3).randbytes(34 * 2**20)
    with storage.open_for_writing(uri) as stream:
        stream.write(body)
    storage.download(uri, tmp_path / "copy", sha256=hashlib.sha256(body).hexdigest())
    assert (tmp_path / "copy").read_bytes() == body
    with storage.open_for_reading(uri) as stream:
        assert stream.read(5) == body[:5]
        stream.seek(-7, 2)
        assert stream.read() == body[-7:]
    assert proxy.injected[fault] > 2


def test_a_lost_answer_to_the_last_request_of_an_upload_is_no_failure(proxy: FaultProxy, s3_server):
    """The object is there, and the server knows the upload no more; what is there is compared with what was sent."""
    proxy.share, proxy.faults, proxy.at_most = 1.0, ("lost answer",), 1
    proxy.only = r"POST .*uploadId="
    uri, body = s3_server.uri("answer-lost"), random.Random(4).randbytes(20 * 2**20)
    with storage.open_for_writing(uri) as stream:
        stream.write(body)
    assert proxy.injected == {"lost answer": 1}
    assert storage.sha256_hex(uri) == hashlib.sha256(body).hexdigest()


def test_an_upload_that_vanished_is_not_taken_for_a_finished_one(proxy: FaultProxy, s3_server):
    """The same lost answer, but in the meantime another writer's object lies there."""
    uri = s3_server.uri("answer-lost-and-replaced")
    proxy.share, proxy.faults, proxy.at_most = 1.0, ("lost answer",), 1
    proxy.only = r"POST .*uploadId="
    proxy.on_lost_answer = lambda: storage.write_bytes(uri, bytes(20 * 2**20))

    def write() -> None:
        with storage.open_for_writing(uri) as stream:
            stream.write(random.Random(5).randbytes(20 * 2**20))

    with pytest.raises(StorageError, match=r"answer-lost-and-replaced: cannot write it .*NoSuchUpload"):
        write()


@pytest.fixture(scope="module")
def many_uri(s3_server) -> str:
    """A folder of 1,050 objects and a folder."""
    uri = s3_server.uri("many")
    names = [f"{number:05d}" for number in range(1050)] + ["inner/object"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: storage.write_bytes(storage.join(uri, name), b""), names))
    return uri


def test_a_listing_of_more_than_a_page_is_whole_with_a_fifth_of_the_requests_disturbed(
    proxy: FaultProxy, many_uri: str
):
    """Two pages; each is retried by itself."""
    expected = [f"{number:05d}" for number in range(1050)] + ["inner/"]
    assert storage.listdir(many_uri) == expected
    assert proxy.requests == {"GET": 2}
    proxy.share, proxy.stall_s = 0.2, 0.05
    for _ in range(6):
        assert storage.listdir(many_uri) == expected
    assert proxy.injected.total() >= 1


def _read(uri: str) -> None:
    storage.read_bytes(uri)


def _read_range(uri: str) -> None:
    storage.read_range(uri, 1, 3)


def _write(uri: str) -> None:
    storage.write_bytes(uri, b"body")


def _list(uri: str) -> None:
    storage.listdir(uri)


def _exists(uri: str) -> None:
    storage.exists(uri)


@pytest.mark.parametrize("call", [_read, _read_range, _write, _list, _exists])
@pytest.mark.parametrize("fault", ["slow down", "reset", "lost answer"])
def test_when_every_request_fails_an_operation_ends_after_the_stated_attempts(
    proxy: FaultProxy, s3_server, short_waits: RetrySettings, call: Callable[[str], None], fault: str
):
    uri = s3_server.uri("folder", "some-key")
    storage.write_bytes(uri, b"some body")
    proxy.requests.clear()
    proxy.share, proxy.faults = 1.0, (fault,)
    with pytest.raises(StorageError) as caught:
        call(uri)
    message = str(caught.value)
    # aiohttp sends a request again at once, a single time, when its connection broke before the answer
    requests_per_attempt = 1 if fault == "slow down" else 2
    assert proxy.requests.total() == requests_per_attempt * short_waits.max_attempts
    assert not isinstance(caught.value, storage.ObjectNotFoundError)
    assert "\n" not in message
    for word in (
        "lipflow/folder/some-key",
        proxy.endpoint,
        "4 attempts",
        "up and reachable",
        "LIPFLOW_S3_MAX_ATTEMPTS",
    ):
        assert word in message


def test_when_every_body_is_short_a_read_ends_after_the_stated_attempts(
    proxy: FaultProxy, s3_server, short_waits: RetrySettings
):
    uri = s3_server.uri("cut")
    storage.write_bytes(uri, b"some body")
    proxy.requests.clear()
    proxy.share, proxy.faults = 1.0, ("truncated",)
    with pytest.raises(StorageError, match="4 attempts"):
        storage.read_bytes(uri)
    assert proxy.requests == {"GET": 4}


def test_a_silent_server_is_left_after_the_read_timeout(
    proxy: FaultProxy, s3_server, short_waits: RetrySettings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LIPFLOW_S3_READ_TIMEOUT_S", "0.2")
    proxy.share, proxy.faults, proxy.stall_s = 1.0, ("stall",), 1.0
    with pytest.raises(StorageError, match="4 attempts"):
        storage.size_bytes(s3_server.uri("silent"))
    assert proxy.requests == {"HEAD": 4}


def test_when_every_request_fails_the_jobs_fail_clearly_and_leave_no_set(
    proxy: FaultProxy, s3_server, capture_uri: str, shards_uri: str, short_waits: RetrySettings, tmp_path
):
    target = s3_server.uri("fault-shards-never")
    capture, shard_set = open_capture(capture_uri), ShardSet.open(shards_uri)
    loader = ShardLoader(shard_set, "train", shard_set.train_camera_ids, LOADER, cache_dir=tmp_path / "cache")
    jobs: list[Callable[[], object]] = [
        lambda: write_shards(capture, SHARDS, target),
        lambda: list(loader.epoch(0)),
        lambda: shard_set.frames(shard_set.frame_ids("train"), shard_set.train_camera_ids),
        lambda: ShardSet.open(shards_uri),
    ]
    proxy.share, proxy.faults = 1.0, ("slow down", "reset", "lost answer")
    for job in jobs:
        with pytest.raises(StorageError, match=r"s3://lipflow/fault-.* 4 attempts at http://127.*up and reachable"):
            job()
    proxy.share = 0.0
    assert not storage.exists(target)
    assert list((tmp_path / "cache").glob("*")) == []


def test_a_large_write_that_fails_for_good_shows_nothing_and_keeps_the_old_object(
    proxy: FaultProxy, s3_server, short_waits: RetrySettings, caplog: pytest.LogCaptureFixture
):
    uri = s3_server.uri("kept-large")
    storage.write_bytes(uri, b"old")

    def write() -> None:
        with storage.open_for_writing(uri) as stream:
            stream.write(bytes(17 * 2**20))
            proxy.share, proxy.faults = 1.0, ("slow down",)
            stream.write(bytes(17 * 2**20))

    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="cannot write"):
        write()
    proxy.share = 0.0
    assert storage.read_bytes(uri) == b"old"
    assert "parts of an abandoned upload" in caplog.text


def test_waits_grow_are_jittered_and_stay_within_the_stated_bound(monkeypatch: pytest.MonkeyPatch):
    """The default: 7 attempts, waits of at most 0.2, 0.4, ... 6.4 s, 12.6 s together; half of each is certain."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail() -> None:
        raise ConnectionResetError

    totals = set()
    for _ in range(50):
        waits.clear()
        with pytest.raises(ConnectionResetError):
            storage_s3.retrying(fail)
        largest = [0.2 * 2**turn for turn in range(6)]
        assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, largest, strict=True))
        totals.add(sum(waits))
    assert RetrySettings.from_environment().longest_wait_s == pytest.approx(12.6)
    assert len(totals) == 50
    monkeypatch.setenv("LIPFLOW_S3_MAX_ATTEMPTS", "9")
    assert RetrySettings.from_environment().longest_wait_s == pytest.approx(12.6 + 10 + 10)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LIPFLOW_S3_MAX_ATTEMPTS", "0"), ("LIPFLOW_S3_MAX_ATTEMPTS", "many"), ("LIPFLOW_S3_MAX_WAIT_S", "nan"),
     ("LIPFLOW_S3_MAX_WAIT_S", "-1")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str):
    monkeypatch.setenv(variable, value)
    with pytest.raises(StorageError, match=f"{variable}={value}: expected a"):
        RetrySettings.from_environment()
