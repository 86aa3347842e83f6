"""``topology.npz`` and ``normalization.npz``: what all samples of a shard set share."""

from __future__ import annotations

import numpy as np

from lipflow.errors import ShardSetError
from lipflow.types import Normalization, Topology
from pipeline.codecs import CodecError, decode_npz, encode_npz, resize_image

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
        names, vertices = arrays["landmark_names"].tolist(), arrays["landmark_vertices"].tolist()
        return Topology(
            faces=arrays["faces"],
            uvs=arrays["uvs"],
            uv_faces=arrays["uv_faces"],
            weight_mask=arrays["weight_mask"],
            landmarks=dict(zip(names, vertices, strict=True)),
            num_vertices=int(arrays["num_vertices"]),
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
            texture_mean=arrays["texture_mean"],
            texture_std=float(arrays["texture_std"]),
            vertices_mean=arrays["vertices_mean"],
            vertices_std=float(arrays["vertices_std"]),
        )
    except (KeyError, TypeError) as error:
        raise ShardSetError(f"{name}: not a normalization ({error}); shard the capture again") from error


def _arrays(body: bytes, name: str) -> dict[str, np.ndarray]:
    try:
        return decode_npz(body, name)
    except CodecError as error:
        raise ShardSetError(f"{error}; shard the capture again") from error
