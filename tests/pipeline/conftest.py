"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tenacity

from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.manifest import Manifest
from pipeline.sharding.shards import ShardConfig, write_shards
from pipeline.storage import s3 as storage_s3
from tests.pipeline import ava256_capture, ava256_layout

SHARD_CONFIG = ShardConfig(frames_per_shard=4)


@pytest.fixture(scope="session")
def dome_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real capture, small: 6 cameras, 5 segments of 3 frames, some views missing. Not to be changed."""
    folder = tmp_path_factory.mktemp("dome")
    config = DomeConfig(
        cameras=6,
        image_size_hw=(48, 36),
        texture_size=32,
        segments=5,
        frames_per_segment=3,
        missing_fraction=0.05,
        headset_image_size_hw=(16, 20),
        supersampling=1,
    )
    write_dome(config, str(folder))
    return folder


@pytest.fixture(scope="session")
def dome(dome_folder: Path) -> Capture:
    """The small capture, open."""
    return open_capture(dome_folder)


@pytest.fixture
def own_dome_folder(dome_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small capture that a test may damage."""
    return Path(shutil.copytree(dome_folder, tmp_path / "dome"))


@pytest.fixture(scope="session")
def shards_folder(dome: Capture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small capture's shard set. Not to be changed."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(dome, SHARD_CONFIG, str(folder))
    return folder


@pytest.fixture(scope="session")
def manifest(shards_folder: Path) -> Manifest:
    """Of that shard set."""
    return Manifest.load(str(shards_folder))


@pytest.fixture
def own_shards_folder(shards_folder: Path, tmp_path: Path) -> Path:
    """A copy of the shard set that a test may damage."""
    return Path(shutil.copytree(shards_folder, tmp_path / "shards"))


@pytest.fixture(scope="session")
def ava256_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small capture in the layout of Ava-256. Not to be changed."""
    folder = tmp_path_factory.mktemp("set") / "capture"
    ava256_layout.write_ava256(folder, ava256_capture.CONFIG, ava256_capture.DISTORTION)
    return folder


@pytest.fixture
def own_ava256_folder(ava256_folder: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(ava256_folder, tmp_path / "set/capture"))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries happen at once."""

    class Immediate(tenacity.Retrying):
        def __init__(self, **settings):
            super().__init__(**{**settings, "wait": tenacity.wait_none()})

    monkeypatch.setattr(storage_s3.tenacity, "Retrying", Immediate)
