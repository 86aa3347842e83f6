"""Storage: files and S3 behave alike; writes are whole or absent; errors say what to do."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from lipflow.errors import StorageError
from pipeline import storage
from pipeline.storage import s3 as storage_s3
from pipeline.storage.errors import explain
from pipeline.storage.s3_settings import RetrySettings, configured_endpoint, settings_for_endpoint


@pytest.fixture(params=["file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder's address, on a disk and on a real S3 server."""
    if request.param == "file":
        return storage.normalize_uri(tmp_path / "store")
    return request.getfixturevalue("s3_server").uri(tmp_path.name)


def test_addresses_are_normalised_and_joined():
    assert storage.normalize_uri("/a/b/") == "file:///a/b"
    assert storage.normalize_uri("file:///a/b/") == "file:///a/b"
    assert storage.normalize_uri("s3://bucket/key/") == "s3://bucket/key"
    assert storage.normalize_uri("x") == f"file://{os.getcwd()}/x"
    assert storage.join("s3://bucket", "a", "b/c") == "s3://bucket/a/b/c"
    assert storage.is_local("/a")
    assert not storage.is_local("s3://bucket")
    with pytest.raises(StorageError, match="file:// or s3://"):
        storage.normalize_uri("gs://bucket/key")
    with pytest.raises(StorageError, match="no bucket"):
        storage.normalize_uri("s3://")


def test_what_is_written_is_read_back_whole_and_by_range(folder: str):
    body = bytes(range(256)) * 50
    uri = storage.join(folder, "a", "b.bin")
    storage.write_bytes(uri, body)
    assert storage.read_bytes(uri) == body
    assert storage.read_range(uri, 300, 77) == body[300:377]
    assert storage.read_range(uri, len(body) - 1, 1) == body[-1:]
    assert storage.read_range(uri, 0, 0) == b""
    assert storage.size_bytes(uri) == len(body)
    assert storage.sha256_hex(uri) == hashlib.sha256(body).hexdigest()
    with storage.open_for_reading(uri) as stream:
        assert stream.read(10) == body[:10]


def test_empty_objects_exist(folder: str):
    storage.write_bytes(storage.join(folder, "empty"), b"")
    with storage.open_for_writing(storage.join(folder, "empty-too")):
        pass
    assert storage.listdir(folder) == ["empty", "empty-too"]
    assert storage.read_bytes(storage.join(folder, "empty")) == b""


def test_listing_is_sorted_and_marks_folders(folder: str):
    for name in ("b", "a/x", "c/y/z"):
        storage.write_bytes(storage.join(folder, name), b"1")
    assert storage.listdir(folder) == ["a/", "b", "c/"]
    assert storage.exists(storage.join(folder, "a"))
    assert storage.exists(storage.join(folder, "b"))
    assert not storage.exists(storage.join(folder, "nothing"))
    with pytest.raises(storage.ObjectNotFoundError):
        storage.listdir(storage.join(folder, "nothing"))


def test_missing_objects_are_named(folder: str):
    uri = storage.join(folder, "missing")
    for read in (storage.read_bytes, storage.size_bytes):
        with pytest.raises(storage.ObjectNotFoundError, match="missing: n"):
            read(uri)
    storage.delete(uri)
    storage.delete_dir(uri)


def test_reading_past_the_end_is_an_error_and_not_a_short_answer(folder: str, no_waiting: None):
    uri = storage.join(folder, "short")
    storage.write_bytes(uri, b"12345")
    with pytest.raises(StorageError, match="short"):
        storage.read_range(uri, 3, 10)


@pytest.mark.parametrize("size_bytes", [10, 40 * 2**20])
def test_a_failed_write_leaves_nothing_behind(folder: str, size_bytes: int):
    """40 MiB goes through a multipart upload, 10 bytes through a single request."""
    uri = storage.join(folder, "half")
    with pytest.raises(RuntimeError, match="stop"), storage.open_for_writing(uri) as stream:  # noqa: PT012
        stream.write(bytes(size_bytes))
        raise RuntimeError("stop")
    assert not storage.exists(uri)
    assert not storage.exists(folder) or storage.listdir(folder) == []


def test_a_failed_overwrite_keeps_the_old_object(folder: str):
    uri = storage.join(folder, "kept")
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError), storage.open_for_writing(uri) as stream:  # noqa: PT012
        stream.write(b"new")
        raise RuntimeError
    assert storage.read_bytes(uri) == b"old"
    storage.write_bytes(uri, b"newer")
    assert storage.read_bytes(uri) == b"newer"


def test_large_streams_arrive_whole(folder: str):
    piece = os.urandom(2**20)
    uri = storage.join(folder, "large")
    with storage.open_for_writing(uri) as stream:
        for _ in range(35):
            stream.write(piece)
    assert storage.sha256_hex(uri) == hashlib.sha256(piece * 35).hexdigest()


def test_folders_go_up_and_come_down_unchanged(folder: str, tmp_path: Path):
    source = tmp_path / "source"
    for name in ("a.txt", "deep/er/b.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    storage.upload_dir(source, storage.join(folder, "copy"))
    storage.download_dir(storage.join(folder, "copy"), tmp_path / "back")
    found = {path.relative_to(tmp_path / "back").as_posix() for path in (tmp_path / "back").rglob("*.txt")}
    assert found == {"a.txt", "deep/er/b.txt"}
    assert (tmp_path / "back" / "deep" / "er" / "b.txt").read_text() == "deep/er/b.txt"
    storage.delete_dir(storage.join(folder, "copy"))
    assert not storage.exists(storage.join(folder, "copy", "a.txt"))


def test_writable_folders_pass_the_check(folder: str):
    storage.check_writable(folder)
    assert not storage.exists(folder) or storage.listdir(folder) == []


def test_a_path_under_a_regular_file_is_not_writable(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="choose a folder that you may write to"):
        storage.check_writable(tmp_path / "file" / "out")


def test_missing_credentials_name_the_bucket_and_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for call in (storage.read_bytes, storage.check_writable, storage.exists, storage.listdir):
        with pytest.raises(StorageError) as caught:
            call("s3://some-bucket/some/key")
        message = str(caught.value)
        assert "\n" not in message
        for word in ("some-bucket", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            assert word in message


def test_wrong_keys_are_a_permission_error(s3_server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="not allowed to write in bucket 'lipflow'"):
        storage.check_writable(s3_server.uri("x"))


def test_a_missing_bucket_is_named(s3_server):
    with pytest.raises(StorageError, match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket/key", b"1")
    with pytest.raises(StorageError, match="no-such-bucket"):
        storage.read_bytes("s3://no-such-bucket/key")


def test_an_unreachable_server_is_named(monkeypatch: pytest.MonkeyPatch, no_waiting: None):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://bucket/key: .* 7 attempts at http://127\.0\.0\.1:9 .* up and"):
        storage.read_bytes("s3://bucket/key")


def _server_error(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


@pytest.mark.parametrize(
    "error",
    [_server_error(503, "SlowDown"), _server_error(500, "InternalError"), ConnectionResetError(), TimeoutError(),
     storage_s3.ShortBodyError("short")],
    ids=repr,
)  # fmt: skip
def test_transient_errors_are_tried_again_but_not_for_ever(error: Exception, no_waiting: None):
    calls = []

    def call() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise error
        return "done"

    assert storage_s3.retrying(call) == "done"
    calls.clear()

    def never() -> str:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        storage_s3.retrying(never)
    assert len(calls) == RetrySettings.from_environment().max_attempts


@pytest.mark.parametrize("error", [_server_error(403, "AccessDenied"), FileNotFoundError(), PermissionError()])
def test_lasting_errors_are_not_tried_again(error: Exception):
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        storage_s3.retrying(call)
    assert len(calls) == 1


def test_a_process_that_dies_in_a_write_leaves_no_object_and_does_not_hang(s3_server):
    """The upload is left open on purpose: the interpreter must still end, and nothing may appear."""
    program = (
        "from pipeline import storage\n"
        f"opened = storage.open_for_writing({s3_server.uri('left-open')!r})\n"
        "stream = opened.__enter__()\n"
        "stream.write(bytes(20 * 2**20))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert not storage.exists(s3_server.uri("left-open"))


@pytest.mark.parametrize(
    ("endpoint", "addressing_style", "checksums"),
    [
        (None, "virtual", "when_supported"),
        ("https://s3.eu-west-1.amazonaws.com", "virtual", "when_supported"),
        ("https://s3.cn-north-1.amazonaws.com.cn", "virtual", "when_supported"),
        ("https://oss-cn-hangzhou.aliyuncs.com", "virtual", "when_required"),
        ("https://cos.ap-guangzhou.myqcloud.com", "virtual", "when_required"),
        ("https://account.r2.cloudflarestorage.com", "path", "when_required"),
        ("https://storage.googleapis.com", "path", "when_required"),
        ("http://minio.internal:9000", "path", "when_required"),
        ("http://127.0.0.1:8080", "path", "when_required"),
        ("https://notamazonaws.com", "path", "when_required"),
    ],
)
def test_settings_follow_from_the_endpoint(endpoint: str | None, addressing_style: str, checksums: str):
    settings = settings_for_endpoint(endpoint)
    assert (settings.addressing_style, settings.checksums) == (addressing_style, checksums)


def test_the_filesystem_is_set_up_for_its_endpoint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.internal:9000")
    monkeypatch.setenv("LIPFLOW_S3_READ_TIMEOUT_S", "7")
    config = storage_s3.s3_filesystem().config_kwargs
    assert config["s3"] == {"addressing_style": "path"}
    assert config["request_checksum_calculation"] == config["response_checksum_validation"] == "when_required"
    assert (config["read_timeout"], config["connect_timeout"], config["max_pool_connections"]) == (7, 10, 64)
    assert config["retries"] == {"total_max_attempts": 1}
    assert storage_s3.s3_filesystem(for_libraries=True).config_kwargs["retries"]["mode"] == "standard"
    monkeypatch.setenv("LIPFLOW_S3_ADDRESSING_STYLE", "virtual")
    assert storage_s3.s3_filesystem().config_kwargs["s3"] == {"addressing_style": "virtual"}


def test_settings_that_no_server_has_are_named(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL=minio:9000: expected http"):
        settings_for_endpoint("minio:9000")
    monkeypatch.setenv("LIPFLOW_S3_ADDRESSING_STYLE", "sideways")
    with pytest.raises(StorageError, match="expected path or virtual"):
        settings_for_endpoint(None)


@pytest.fixture
def profile(s3_server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keys and endpoint of the server in files of a profile, and not in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    keys, config = tmp_path / "credentials", tmp_path / "config"
    keys.write_text("[lab]\naws_access_key_id = test-key\naws_secret_access_key = test-secret\n")
    config.write_text(f"[profile lab]\nendpoint_url = {s3_server.endpoint}\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    return config


def test_keys_and_endpoint_may_come_from_a_profile(profile: Path, s3_server, monkeypatch: pytest.MonkeyPatch):
    assert configured_endpoint() == s3_server.endpoint
    uri = s3_server.uri("by-profile")
    storage.write_bytes(uri, b"body")
    assert storage.read_bytes(uri) == b"body"
    monkeypatch.setenv("AWS_PROFILE", "another")
    with pytest.raises(StorageError, match=r"by-profile: .*another"):
        storage.read_bytes(uri)


def test_the_endpoint_may_come_from_a_services_section(profile: Path):
    profile.write_text("[profile lab]\nservices = here\n[services here]\ns3 =\n  endpoint_url = http://one:1\n")
    assert configured_endpoint() == "http://one:1"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDenied", "check AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "check AWS_ACCESS_KEY_ID"),
        ("403", "check AWS_ACCESS_KEY_ID"),
        ("ExpiredToken", "have expired"),
        ("400", "have expired"),
        ("RequestTimeTooSkewed", "set its clock"),
        ("PermanentRedirect", "set AWS_DEFAULT_REGION"),
        ("NoSuchBucket", "create it or correct the address"),
        ("PreconditionFailed", "changed while it was read"),
        ("SlowDown", "LIPFLOW_S3_MAX_ATTEMPTS"),
        ("TeapotError", "check AWS_ENDPOINT_URL"),
    ],
)
def test_every_refusal_names_the_endpoint_and_the_remedy(code: str, remedy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://server:1")
    reason = explain("s3://bucket/key", "read", _server_error(400, code))
    assert reason is not None
    assert remedy in reason
    assert code == "PermanentRedirect" or "http://server:1" in reason


def test_what_is_not_about_storage_is_left_alone():
    assert explain("s3://bucket/key", "write", RuntimeError("a bug")) is None
