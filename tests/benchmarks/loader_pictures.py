"""The pictures that all loaders of ``loader.py`` read: a capture in the Multiface layout, and shard sets of it.

Lossless codecs are only as fast and small as the pictures let them be, so their content is a real photo and a real
texture where a face asset is at hand (``photo.png``, ``texture.png``), else one rendered view of the synthetic dome.
Each file is that content rolled by another offset, some mirrored: files differ, their entropy does not.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.captures.multiface import TEXTURE_FOLDER
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.driving.driven import DrivingConfig
from pipeline.images.codecs import Chroma, ImageCodec
from pipeline.manifest import Manifest, SampleRecord, ShardRecord
from pipeline.sharding.samples import FRAME
from pipeline.sharding.shards import ShardConfig, write_shards
from pipeline.sharding.splits import SplitConfig
from pipeline.sharding.tar import ShardWriter

PHOTO_SIZE_HW = (2048, 1334)
TRAINING_SIZE_HW = (1024, 667)
TEXTURE_SIZE = 1024
JPEG_QUALITY = 95
_FRAMES_PER_SHARD = 2
_SPLITS = SplitConfig(test_fraction=0, val_fraction=0, test_camera_count=0)


@dataclass(frozen=True)
class StoredImages:
    """How a shard set's camera images are stored.

    Attributes:
        name: in the table, and of the folder.
        codec: of the shard configuration.
        size_hw: of the images, pixels.
        chroma: of JPEG images.
    """

    name: str
    codec: ImageCodec
    size_hw: tuple[int, int]
    chroma: Chroma = "444"


def write_capture(folder: Path, cameras: int, frames: int, face: Path | None) -> None:
    """A capture of one segment, all PNG: full-size photos, average textures, view textures of the first frame."""
    config = DomeConfig(
        cameras=cameras,
        image_size_hw=(64, 42),
        texture_size=16,
        segments=1,
        frames_per_segment=frames,
        supersampling=1,
        headset_image_size_hw=(16, 20),
        face=None if face is None else str(face),
    )
    write_dome(config, str(folder))
    photo, texture = _content(face)
    photos = sorted((folder / "images").glob("*/*/*.png"))
    averages = sorted((folder / TEXTURE_FOLDER).glob("*/average/*.png"))
    first_frame = [path for path in photos if path.stem == photos[0].stem]
    view_textures = [folder / TEXTURE_FOLDER / path.relative_to(folder / "images") for path in first_frame]
    for path in view_textures:
        path.parent.mkdir(parents=True, exist_ok=True)
    jobs = [(path, photo) for path in photos] + [(path, texture) for path in (*averages, *view_textures)]
    with ProcessPoolExecutor(2) as pool:
        paths, contents = zip(*jobs, strict=True)
        list(pool.map(_write_jittered, paths, contents, range(len(jobs)), chunksize=4))
    Image.fromarray(texture).save(folder / "tex_mean.png")


def write_sets(capture: Path, out: Path, stored: list[StoredImages]) -> None:
    """A shard set of the capture for each way of storing, ``out/NAME``."""
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_write_set, itertools.repeat(capture), itertools.repeat(out), stored))


def repeat_set(source: Path, target: Path, times: int) -> None:
    """The same frames several times under new names, so that an epoch is long enough to be timed.

    Args:
        source: a shard set.
        target: the folder of the new one.
        times: copies of each frame.
    """
    manifest = Manifest.load(str(source))
    samples = [(shard, sample) for shard in manifest.shards for sample in shard.samples]
    target.mkdir(parents=True)
    repeated = [(shard, sample, number) for number in range(times) for shard, sample in samples]
    shards = []
    for start in range(0, len(repeated), _FRAMES_PER_SHARD):
        chosen = repeated[start : start + _FRAMES_PER_SHARD]
        shards.append(_rewritten_shard(source, target, f"train-{len(shards):06d}.tar", chosen))
    _commit(source, target, manifest, shards)


def image_bodies(folder: Path) -> Iterator[tuple[SampleRecord, dict[str, bytes]]]:
    """Each sample of a set, and the bytes of its average texture and camera images by suffix."""
    for shard in Manifest.load(str(folder)).shards:
        for sample in shard.samples:
            wanted = {name: place for name, place in sample.members.items() if is_picture(name)}
            yield sample, {name: _bytes_at(folder / shard.name, *place[:2]) for name, place in wanted.items()}


def is_picture(suffix: str) -> bool:
    """Whether a member is a camera image or the average texture."""
    return ".image." in suffix or suffix.startswith("avgtex.")


def _content(face: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """A photo ``(2048, 1334, 3)`` and a texture ``(1024, 1024, 3)``."""
    if face is not None:
        photo, texture = (np.asarray(Image.open(face / name).convert("RGB")) for name in ("photo.png", "texture.png"))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            config = DomeConfig(
                cameras=1,
                image_size_hw=PHOTO_SIZE_HW,
                texture_size=TEXTURE_SIZE,
                segments=1,
                frames_per_segment=1,
                supersampling=1,
            )
            write_dome(config, scratch)
            names = (next(Path(scratch, "images").rglob("*.png")), next(Path(scratch, TEXTURE_FOLDER).rglob("*.png")))
            photo, texture = (np.asarray(Image.open(name).convert("RGB")) for name in names)
    if photo.shape != (*PHOTO_SIZE_HW, 3) or texture.shape != (TEXTURE_SIZE, TEXTURE_SIZE, 3):
        raise SystemExit(f"{face}: photo {photo.shape}, texture {texture.shape}; expected 2048x1334 and 1024x1024")
    return photo, texture


def _write_jittered(path: Path, content: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, columns = (int(generator.integers(size)) for size in content.shape[:2])
    rolled = np.roll(content, (rows, columns), axis=(0, 1))
    Image.fromarray(np.ascontiguousarray(rolled[:, ::-1] if seed % 2 else rolled)).save(path)


def _write_set(capture: Path, out: Path, stored: StoredImages) -> None:
    config = ShardConfig(
        image_size_hw=stored.size_hw,
        codec=stored.codec,
        quality=JPEG_QUALITY,
        chroma=stored.chroma,
        splits=_SPLITS,
        driving=DrivingConfig(render="never"),
    )
    write_shards(str(capture), config, str(out / stored.name))


def _rewritten_shard(
    source: Path, target: Path, name: str, chosen: list[tuple[ShardRecord, SampleRecord, int]]
) -> ShardRecord:
    """A shard of samples of other shards, each under a new frame name."""
    samples = []
    with (target / name).open("wb") as stream, ShardWriter(stream) as writer:
        for shard, sample, number in chosen:
            frame_id = sample.frame_id if number == 0 else f"{sample.frame_id}-{number}"
            members = []
            for suffix, place in sample.members.items():
                body = _bytes_at(source / shard.name, *place[:2])
                if suffix == FRAME:
                    body = json.dumps(json.loads(body) | {"frame": frame_id.partition("/")[2]}, sort_keys=True).encode()
                members.append((suffix, body))
            places = writer.add_sample(frame_id, iter(members))
            samples.append(SampleRecord(frame_id=frame_id, members=places))
    return ShardRecord(
        name=name, split="train", sha256=writer.sha256, size_bytes=writer.size_bytes, samples=tuple(samples)
    )


def _commit(source: Path, target: Path, manifest: Manifest, shards: list[ShardRecord]) -> None:
    for name in manifest.files:
        storage.write_bytes(target / name, storage.read_bytes(source / name))
    manifest.model_copy(update={"shards": tuple(shards)}).save(str(target))


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(size)
