"""The rows of ``loader.py`` that run in this project's environment: ours, the decode limit, and the naive loader.

Started by ``loader.py`` as ``loader_rows.py KIND JSON``; see :mod:`timed_rows`.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
import torch
from loader_pictures import image_bodies
from PIL import Image
from timed_rows import serve

from lipflow.types import FrameBatch
from pipeline.images.planar import decode_planar, planar_size_chw
from pipeline.loading.loader import LoaderConfig, ShardLoader
from pipeline.loading.shardset import ShardSet

_MAX_PIXELS = 8192 * 8192
_CACHE_BYTES = 512 * 2**20
"""Of shards from S3; local ones are read where they lie."""


def ours(uri: str, views: int, threads: int | None = None, cold: bool = False) -> Callable[[int], int]:
    """Epochs of this project's loader; each batch is one frame with ``views`` of its views.

    Args:
        uri: the shard set.
        views: of each frame.
        threads: that decode; None: one a core.
        cold: open the set anew for each epoch, with an empty cache: shards are fetched and their digests checked. The
            cache holds less than an epoch, as that of a set larger than the disk does, so that its memory goes round.
            A virtual machine gives pages that are free for seconds back to its host; to have them again for each byte
            of an epoch would cost as much as to fetch it.
    """
    loaders: dict[int, ShardLoader] = {}
    caches: list[tempfile.TemporaryDirectory] = []
    epochs = 0

    def opened(workers: int, cache: str | None) -> ShardLoader:
        shard_set = ShardSet.open(uri)
        config = LoaderConfig(
            frames_per_batch=1,
            views_per_frame=views,
            signals=(),
            decode_threads=threads or workers,
            cache_max_bytes=_CACHE_BYTES,
            seed=1,
        )
        return ShardLoader(shard_set, "train", shard_set.train_camera_ids, config, cache_dir=cache)

    def run_pass(workers: int) -> int:
        nonlocal epochs
        epochs += 1
        if cold:
            while caches:
                caches.pop().cleanup()
            caches.append(tempfile.TemporaryDirectory(prefix="loader-benchmark-"))
            return _views(opened(workers, caches[0].name), epochs)
        if workers not in loaders:
            loaders[workers] = opened(workers, None)
        return _views(loaders[workers], epochs)

    return run_pass


def _views(loader: ShardLoader, epoch: int) -> int:
    def present(batch: FrameBatch) -> int:
        return int(batch.view_present.sum())

    return sum(present(batch) for batch in loader.epoch(epoch))


def limit(folder: str) -> Callable[[int], int]:
    """The codec in a bare loop over the same bytes in memory: each frame's average texture and all of its views.

    Pixels stay where the codec puts them, see :func:`decode_in_place`. Two workers are two processes, which share
    nothing.
    """
    frames = [list(bodies.items()) for _, bodies in image_bodies(Path(folder))]
    pools: dict[int, multiprocessing.pool.Pool] = {}
    for name, body in frames[0]:
        decode_in_place(name, body)  # the planar decoder is compiled, or loaded, at its first call

    def decode_share(start: int, step: int) -> int:
        for pictures in frames[start::step]:
            for name, body in pictures:
                decode_in_place(name, body)
        return sum(len(pictures) - 1 for pictures in frames[start::step])

    def run_pass(workers: int) -> int:
        if workers == 1:
            return decode_share(0, 1)
        if workers not in pools:
            _shared.append(decode_share)
            pools[workers] = multiprocessing.get_context("fork").Pool(workers)
        return sum(pools[workers].starmap(_call_shared, [(start, workers) for start in range(workers)], chunksize=1))

    return run_pass


_shared: list[Callable[[int, int], int]] = []
"""What forked workers inherit."""


def _call_shared(start: int, step: int) -> int:
    return _shared[0](start, step)


def decode_in_place(name: str, body: bytes) -> None:
    """The codec's own work and nothing else; the limit of all that uses it.

    Pixels go to memory that is there already, one picture's for all of a kind: those of planar by planes, the others as
    they come, interleaved. Fresh arrays would make the limit slower, and by how much is up to the allocator.
    """
    if name.endswith(".plz"):
        shape = planar_size_chw(body, _MAX_PIXELS)
        if shape not in _planes:
            _planes[shape] = np.empty(shape, np.uint8)
        decode_planar(body, _planes[shape])
    elif name.endswith(".jpg"):
        size_hw = simplejpeg.decode_jpeg_header(body)[:2]
        if size_hw not in _planes:
            _planes[size_hw] = np.empty((*size_hw, 3), np.uint8)
        simplejpeg.decode_jpeg(body, "RGB", buffer=_planes[size_hw])
    else:
        decode = imagecodecs.png_decode if name.endswith(".png") else imagecodecs.webp_decode
        kind = (".image." in name, name[-4:])
        if kind not in _planes:
            _planes[kind] = decode(body)
        decode(body, out=_planes[kind])


_planes: dict[tuple, np.ndarray] = {}


def decode_to_array(name: str, body: bytes) -> np.ndarray:
    """What a plain script does: ``numpy.asarray(Image.open(...))``, or the planar decoder into a fresh array."""
    if name.endswith(".plz"):
        target = np.empty(planar_size_chw(body, _MAX_PIXELS), np.uint8)
        decode_planar(body, target)
        return target
    return np.asarray(Image.open(io.BytesIO(body)))


class NaiveViews(torch.utils.data.Dataset):
    """One sample a view, in the manner of the public Multiface loader: every file anew for every view, float32.

    Args:
        root: the capture.
        count: samples.
        with_view_texture: three pictures a sample, as there; else photo and average texture alone.
    """

    def __init__(self, root: Path, count: int, *, with_view_texture: bool):
        self._root, self._with_view_texture = root, with_view_texture
        listed = [line.split() for line in (root / "frame_list.txt").read_text().splitlines()]
        cameras = sorted(path.name for path in (root / "images" / listed[0][0]).iterdir())
        self._samples = [(*frame, camera) for frame in listed for camera in cameras][:count]
        self._texture_mean = np.asarray(Image.open(root / "tex_mean.png"), np.float32)[::-1].copy()
        self._texture_std = float(np.genfromtxt(root / "tex_var.txt")) ** 0.5
        self._vertices_mean = np.fromfile(root / "vert_mean.bin", np.float32)
        self._vertices_std = float(np.genfromtxt(root / "vert_var.txt")) ** 0.5

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        segment, frame, camera = self._samples[place]
        mesh = self._root / "tracked_mesh" / segment
        vertices = np.fromfile(mesh / f"{frame}.bin", np.float32)
        vertices = (vertices - self._vertices_mean) / self._vertices_std
        pose = np.genfromtxt(mesh / f"{frame}_transform.txt").astype(np.float32)
        photo = np.asarray(Image.open(self._root / "images" / segment / camera / f"{frame}.png"), np.float32) / 255
        sample = {"vertices": vertices, "pose": pose, "photo": photo, "average": self._texture(segment, frame)[0]}
        if self._with_view_texture:
            sample["texture"], sample["mask"] = self._texture(segment, frame, camera)
        return sample

    def _texture(self, segment: str, frame: str, source: str = "average") -> tuple[np.ndarray, np.ndarray]:
        path = self._root / "unwrapped_uv_1024" / segment / source / f"{frame}.png"
        texture = np.asarray(Image.open(path), np.float32)[::-1]
        unseen = texture == 0
        texture = (texture - self._texture_mean) / self._texture_std
        texture[unseen] = 0
        return texture.transpose(2, 0, 1).copy(), 1 - unseen.astype(np.float32).transpose(2, 0, 1)


def naive(folder: str, count: int, batch: int, with_view_texture: bool) -> Callable[[int], int]:
    """PyTorch's ``DataLoader`` over :class:`NaiveViews`."""
    views = NaiveViews(Path(folder), count, with_view_texture=with_view_texture)

    def run_pass(workers: int) -> int:
        loader = torch.utils.data.DataLoader(views, batch_size=batch, num_workers=0 if workers == 1 else workers)
        return sum(len(found["photo"]) for found in loader)

    return run_pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = {"ours": ours, "limit": limit, "naive": naive}
    serve(kinds[sys.argv[1]](**json.loads(sys.argv[2])))
