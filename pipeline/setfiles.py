"""``topology.npz`` and ``normalization.npz``: what all samples of a shard set share."""

from __future__ import annotations

import numpy as np

from lipflow.errors import ShardSetError
from lipflow.types import Normalization, Topology
from pipeline.images.codecs import CodecError, decode_npz, encode_npz, resize_image

TOPOLOGY_NAME = "topology.npz"
NORMALIZATION_NAME = "normalization.npz"


def encode_topology(topology: Topology, texture_size: int) -> bytes:
    """The bytes of ``topology.npz``, with the weight mask at the stored texture size."""
    mask = resize_image(topology.weight_mask.astype(np.float32), (texture_size, texture_size))
    return encode_npz(
        {
            "faces": topology.faces.astype(np.int64),
            "uvs": topology.uvs.astype(np.float32),
            "uv_faces": topology.uv_faces.astype(np.int64),
            "weight_mask": mask,
            "landmark_names": np.array(list(topology.landmarks), dtype=np.str_),
            "landmark_vertices": np.array(list(topology.landmarks.values()), dtype=np.int64),
            "num_vertices": np.array(topology.num_vertices, dtype=np.int64),
        }
    )


def decode_topology(body: bytes, name: str) -> Topology:
    """The topology in the bytes of ``topology.npz``.

    Raises:
        ShardSetError: they are no such file.
    """
    arrays = _arrays(body, name)
    try:
        vertices = _checked(arrays, "landmark_vertices", np.int64, (None,)).tolist()
        names = arrays["landmark_names"]
        if names.dtype.kind != "U" or names.shape != (len(vertices),):
            raise ValueError(f"landmark_names is {names.dtype} {names.shape}")
        return Topology(
            faces=_checked(arrays, "faces", np.int64, (None, 3)),
            uvs=_checked(arrays, "uvs", np.float32, (None, 2)),
            uv_faces=_checked(arrays, "uv_faces", np.int64, (None, 3)),
            weight_mask=_checked(arrays, "weight_mask", np.float32, (None, None)),
            landmarks=dict(zip(names.tolist(), vertices, strict=True)),
            num_vertices=int(_checked(arrays, "num_vertices", np.int64, ())),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ShardSetError(f"{name}: not a topology ({error}); shard the capture again") from error


def encode_normalization(normalization: Normalization) -> bytes:
    """The bytes of ``normalization.npz``."""
    return encode_npz(
        {
            "texture_mean": normalization.texture_mean.astype(np.float32),
            "texture_std": np.array(normalization.texture_std, dtype=np.float64),
            "vertices_mean": normalization.vertices_mean.astype(np.float32),
            "vertices_std": np.array(normalization.vertices_std, dtype=np.float64),
        }
    )


def decode_normalization(body: bytes, name: str) -> Normalization:
    """The statistics in the bytes of ``normalization.npz``.

    Raises:
        ShardSetError: they are no such file.
    """
    arrays = _arrays(body, name)
    try:
        return Normalization(
            texture_mean=_checked(arrays, "texture_mean", np.float32, (3, None, None)),
            texture_std=float(_checked(arrays, "texture_std", np.float64, ())),
            vertices_mean=_checked(arrays, "vertices_mean", np.float32, (None, 3)),
            vertices_std=float(_checked(arrays, "vertices_std", np.float64, ())),
        )
    except (KeyError, ValueError) as error:
        raise ShardSetError(f"{name}: not a normalization ({error}); shard the capture again") from error


def _checked(arrays: dict[str, np.ndarray], name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    """The array ``name``, which has to be of that type and shape; None is any length."""
    array = arrays[name]
    fits = len(array.shape) == len(shape)
    fits = fits and all(side in (None, found) for side, found in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return array


def _arrays(body: bytes, name: str) -> dict[str, np.ndarray]:
    try:
        return decode_npz(body, name)
    except CodecError as error:
        raise ShardSetError(f"{error}; shard the capture again") from error
