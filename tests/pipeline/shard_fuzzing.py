"""A tiny shard set, ways to damage it, and what becomes of each: run as a process of its own, within limits.

``python shard_fuzzing.py FOLDER FIRST COUNT`` prints one JSON line a failure and a last one with the counts; the
number of the case at work stands in ``FOLDER/case``, so that the parent can name the case that ended the process.
A case is a pure function of its number.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
import torch

from lipflow.errors import LipflowError
from lipflow.types import FrameBatch, Normalization, Topology
from pipeline.checks.shard_verification import verify_shards
from pipeline.images.codecs import LosslessCodec, encode_array, encode_image
from pipeline.loading.loader import LoaderConfig, ShardLoader, ShardSet
from pipeline.manifest import CameraRecord, CaptureRecord, Manifest, SampleRecord, ShardRecord
from pipeline.setfiles import NORMALIZATION_NAME, TOPOLOGY_NAME, encode_normalization, encode_topology
from pipeline.sharding.samples import (
    FRAME,
    KEYPOINTS,
    VERTICES,
    average_texture_suffix,
    headset_suffix,
    image_suffix,
)
from pipeline.sharding.tar import ShardWriter
from tests.pipeline import shard_member_mutations, shard_mutations  # noqa: F401 - they register themselves
from tests.pipeline.shard_forging import MUTATIONS, Case

ADDRESS_SPACE_BYTES = 512 * 2**20
"""What a case may map beyond what the libraries have mapped when they are loaded."""
CASE_S = 30
"""After so long a case hangs."""

CAMERAS, HEADSET, POINTS = ("400001", "400002"), ("cyclops",), ("nose_tip", "chin")
FRAMES = {"train": ("EXP_a/000000",), "test": ("EXP_b/000000",)}
IMAGE_SIZE_HW, TEXTURE_SIZE, VERTEX_COUNT = (12, 16), 8, 12
_Result = TypeVar("_Result")
LOADER = LoaderConfig(frames_per_batch=1, views_per_frame=2, visits_per_epoch=1, decode_threads=1, prefetch_batches=0)


def write_tiny_set(folder: Path, codec: str = "png") -> None:
    """Two shards of one frame each, two cameras, one view missing; every kind of member.

    Average textures have the images' codec if it is lossless.
    """
    texture_codec = codec if codec in get_args(LosslessCodec) else "png"
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shards = []
    for split, frame_ids in FRAMES.items():
        name, samples = f"{split}-000000.tar", []
        with (folder / name).open("wb") as stream, ShardWriter(stream) as writer:
            for frame_id in frame_ids:
                present = CAMERAS[:1] if frame_id.startswith("EXP_b") else CAMERAS
                places = writer.add_sample(
                    frame_id, iter(_members(random, frame_id, present, codec, texture_codec).items())
                )
                missing = tuple(camera for camera in CAMERAS if camera not in present)
                samples.append(SampleRecord(frame_id=frame_id, members=places, missing_views=missing))
        shards.append(
            ShardRecord(
                name=name, split=split, sha256=writer.sha256, size_bytes=writer.size_bytes, samples=tuple(samples)
            )
        )
    topology = Topology(
        faces=np.arange(12).reshape(4, 3),
        uvs=random.random((12, 2), np.float32),
        uv_faces=np.arange(12).reshape(4, 3),
        weight_mask=np.ones((TEXTURE_SIZE, TEXTURE_SIZE), np.float32),
        landmarks=dict(zip(POINTS, (0, 1), strict=True)),
        num_vertices=VERTEX_COUNT,
    )
    normalization = Normalization(
        texture_mean=random.random((3, TEXTURE_SIZE, TEXTURE_SIZE), np.float32),
        texture_std=20.0,
        vertices_mean=random.random((VERTEX_COUNT, 3), np.float32),
        vertices_std=5.0,
    )
    bodies = {
        TOPOLOGY_NAME: encode_topology(topology, TEXTURE_SIZE),
        NORMALIZATION_NAME: encode_normalization(normalization),
    }
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    pose = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 900.0))
    intrinsics = ((20.0, 0.0, 8.0), (0.0, 20.0, 6.0), (0.0, 0.0, 1.0))
    cameras = [
        CameraRecord(camera_id=name, intrinsics=intrinsics, cam_from_world=pose, image_size_hw=IMAGE_SIZE_HW)
        for name in (*CAMERAS, *HEADSET)
    ]
    Manifest(
        config={"codec": codec, "texture_codec": texture_codec},
        captures=(
            CaptureRecord(
                name=None,
                uri="file:///capture",
                cameras=tuple(cameras[: len(CAMERAS)]),
                headset_cameras=tuple(cameras[len(CAMERAS) :]),
            ),
        ),
        camera_ids=CAMERAS,
        fingerprint="0" * 64,
        files={name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()},
        shards=tuple(shards),
        train_camera_ids=CAMERAS,
        test_camera_ids=(),
        frontal_camera_id=CAMERAS[0],
        keypoint_names=POINTS,
        splits={"train": ("EXP_a",), "val": (), "test": ("EXP_b",)},
        image_size_hw=IMAGE_SIZE_HW,
        texture_size=TEXTURE_SIZE,
        num_vertices=VERTEX_COUNT,
    ).save(str(folder))


def _members(
    random: np.random.Generator, frame_id: str, cameras: tuple[str, ...], codec: str, texture_codec: str
) -> dict[str, bytes]:
    def picture(*shape: int) -> np.ndarray:
        return random.integers(0, 256, shape, np.uint8)

    segment, frame = frame_id.split("/")
    facts = {"segment": segment, "frame": frame, "world_from_head": np.eye(3, 4).tolist(), "cameras": list(cameras)}
    return {
        VERTICES: encode_array(random.random((VERTEX_COUNT, 3), np.float32)),
        average_texture_suffix(texture_codec): encode_image(picture(TEXTURE_SIZE, TEXTURE_SIZE, 3), texture_codec),
        KEYPOINTS: encode_array(random.random((len(POINTS), 3), np.float32)),
        **{headset_suffix(name): encode_image(picture(*IMAGE_SIZE_HW), "png") for name in HEADSET},
        **{image_suffix(name, codec): encode_image(picture(*IMAGE_SIZE_HW, 3), codec) for name in cameras},
        FRAME: json.dumps(facts | {"headset": list(HEADSET), "keypoints": True}).encode(),
    }


@dataclass(frozen=True)
class Failure:
    """A case that broke a promise.

    Attributes:
        case: its number.
        mutation: what was done, with the choices drawn.
        promise: ``named-error``, ``no-silent-change``, ``refused``, ``vouched`` or ``in-time``.
        detail: what happened instead.
    """

    case: int
    mutation: str
    promise: str
    detail: str


@dataclass(frozen=True)
class Outcome:
    """What becomes of a set.

    Attributes:
        good: whether verification found nothing bad.
        set_digest: what the set says that it is; None if it cannot be opened.
        trained: digest of all batches of the loader; None after a named error.
        looked_up: digest of all frames by random access; None after a named error.
        escapes: errors that are not named.
    """

    good: bool
    set_digest: str | None
    trained: str | None
    looked_up: str | None
    escapes: tuple[str, ...]


class Fuzzer:
    """Damages copies of the tiny set and judges what becomes of them.

    Args:
        folder: where the set is written, and damaged.
        codec: of its images.
    """

    def __init__(self, folder: Path, codec: str):
        self._folder = folder
        write_tiny_set(folder, codec)
        self._files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self._sound = self._outcome()
        if not self._sound.good or None in asdict(self._sound).values() or self._sound.escapes:
            raise RuntimeError(f"the undamaged set is not read: {self._sound}")

    def run(self, number: int, counts: Counter[str]) -> Iterator[Failure]:
        """Do one case."""
        names = list(MUTATIONS)
        name = names[number % len(names)]
        random = np.random.default_rng(number)
        case = MUTATIONS[name](random, self._files)
        label = f"{name}: {case.what}"
        changed = {key: body for key, body in case.files.items() if self._files.get(key) != body}
        for key, body in changed.items():
            if body is None:
                (self._folder / key).unlink()
            else:
                (self._folder / key).write_bytes(body)
        started = time.perf_counter()
        outcome = self._outcome()
        elapsed_s = time.perf_counter() - started
        for key in changed:
            if key in self._files:
                (self._folder / key).write_bytes(self._files[key])
            else:
                (self._folder / key).unlink()
        counts[name] += 1
        counts["good"] += outcome.good
        counts["unchanged"] += outcome == self._sound
        for promise, detail in self._judge(case, outcome, counts) if changed else ():
            yield Failure(number, label, promise, detail)
        if elapsed_s > CASE_S / 3:
            yield Failure(number, label, "in-time", f"{elapsed_s:.1f} s")

    def _judge(self, case: Case, outcome: Outcome, counts: Counter[str]) -> Iterator[tuple[str, str]]:
        sound = self._sound
        for escape in outcome.escapes:
            yield "named-error", escape
        if outcome.good and None in (outcome.trained, outcome.looked_up) and not outcome.escapes:
            yield "vouched", "verification found nothing bad, but the set cannot be read"
        if case.refused and outcome.good:
            yield "refused", "verification found nothing bad"
        if case.sealed:
            return
        if outcome.set_digest not in (None, sound.set_digest):
            yield "no-silent-change", "the manifest is another one, and the set was opened"
        if outcome.good and outcome != sound:
            yield "no-silent-change", "verification found nothing bad, but other data are read"
        if outcome.trained not in (None, sound.trained):
            yield "no-silent-change", "the loader gave other data without an error"
        counts["unnoticed by random access"] += outcome.looked_up not in (None, sound.looked_up)

    def _outcome(self) -> Outcome:
        escapes: list[str] = []
        uri = str(self._folder)
        report = _attempt(escapes, lambda: verify_shards(uri))
        shard_set = _attempt(escapes, lambda: ShardSet.open(uri))
        if shard_set is None:
            return Outcome(bool(report and report.good), None, None, None, tuple(escapes))
        set_digest = _attempt(escapes, lambda: shard_set.digest)
        trained = _attempt(escapes, lambda: _train(shard_set))
        looked_up = _attempt(escapes, lambda: _look_up(shard_set))
        return Outcome(bool(report and report.good), set_digest, trained, looked_up, tuple(escapes))


def _train(shard_set: ShardSet) -> str:
    digest = hashlib.sha256()
    for split in FRAMES:
        if not shard_set.frame_ids(split):
            continue
        loader = ShardLoader(shard_set, split, shard_set.train_camera_ids, LOADER)
        for batch in loader.epoch(0):
            _add_batch(digest, batch)
    return digest.hexdigest()


def _look_up(shard_set: ShardSet) -> str:
    digest = hashlib.sha256()
    for split in FRAMES:
        frame_ids = shard_set.frame_ids(split)
        if frame_ids:
            _add_batch(digest, shard_set.frames(frame_ids, shard_set.train_camera_ids))
    return digest.hexdigest()


def _attempt(escapes: list[str], call: Callable[[], _Result]) -> _Result | None:
    """What it returns; None after a named error. Everything else is an escape."""
    try:
        return call()
    except LipflowError as error:
        if not str(error) or ("\n" in str(error).strip() and len(str(error)) > 2000):
            escapes.append(f"an error of no use: {error!r}"[:300])
        return None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        places = [f"{Path(entry.filename).name}:{entry.lineno}" for entry in last if "/pipeline/" in entry.filename]
        escapes.append(f"{type(error).__name__}: {str(error)[:160]} at {' < '.join(reversed(places[-3:]))}")
        return None


def _add_batch(digest, batch: FrameBatch) -> None:
    digest.update(repr(batch.frame_ids).encode())
    driving = batch.driving
    for tensor in (
        batch.vertices,
        batch.average_texture,
        batch.images,
        batch.view_present,
        batch.camera_index,
        batch.cameras.intrinsics,
        batch.cameras.cam_from_head,
        driving.hmc_images,
        driving.hmc_present,
        driving.frontal_images,
        driving.keypoints,
    ):
        digest.update(b"none" if tensor is None else tensor.contiguous().numpy().tobytes())


def main(folder: Path, first: int, count: int, codec: str) -> None:
    """Run ``count`` cases from number ``first`` on, within the limits, and print what failed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fuzzer = Fuzzer(folder / "set", codec)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE_BYTES,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: Counter[str] = Counter()
    started = time.process_time()
    for number in range(first, first + count):
        (folder / "case").write_text(str(number))
        faulthandler.dump_traceback_later(CASE_S, exit=True)
        for failure in fuzzer.run(number, counts):
            print(json.dumps(asdict(failure)), flush=True)
    faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    with contextlib.suppress(FileNotFoundError):
        (folder / "case").unlink()
    summary = {"cases": count, "counts": dict(counts), "grown_bytes": grown, "cpu_s": time.process_time() - started}
    print(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
