"""Triangle meshes with one texture chart as Wavefront OBJ: ``v``, ``vt`` and ``f v/vt`` lines, as Multiface has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lipflow.errors import CaptureError


@dataclass(frozen=True)
class ObjMesh:
    """The content of an OBJ file.

    Attributes:
        vertices: ``(V, 3)`` float32, mm.
        uvs: ``(U, 2)`` float32, v grows upwards on the texture's image.
        faces: ``(F, 3)`` int64 into ``vertices``.
        uv_faces: ``(F, 3)`` int64 into ``uvs``.
    """

    vertices: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    uv_faces: np.ndarray


def parse_obj(text: str, source: str) -> ObjMesh:
    """Read vertices, texture coordinates and faces; polygons are split into fans, all other lines are ignored.

    Raises:
        CaptureError: a line that cannot be read, a face without texture coordinates, or an index out of range.
    """
    vertices: list[list[float]] = []
    uvs: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    uv_faces: list[tuple[int, int, int]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0] not in ("v", "vt", "f"):
            continue
        try:
            if words[0] == "v":
                x, y, z = (float(word) for word in words[1:4])
                vertices.append([x, y, z])
            elif words[0] == "vt":
                u, v = (float(word) for word in words[1:3])
                uvs.append([u, v])
            else:
                corners = [tuple(int(index) for index in word.split("/")[:2]) for word in words[1:]]
                for a, b, c in ((corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1)):
                    faces.append((a[0], b[0], c[0]))
                    uv_faces.append((a[1], b[1], c[1]))
        except (ValueError, IndexError) as error:
            raise CaptureError(
                f"{source}:{number}: expected v x y z, vt u v or f v/vt v/vt v/vt, found {line.strip()!r}"
            ) from error
    if not vertices or not uvs or not faces:
        raise CaptureError(f"{source}: expected v, vt and f lines, found {len(vertices)}, {len(uvs)} and {len(faces)}")
    return ObjMesh(
        vertices=np.array(vertices, dtype=np.float32),
        uvs=np.array(uvs, dtype=np.float32),
        faces=_zero_based(np.array(faces, dtype=np.int64), len(vertices), source),
        uv_faces=_zero_based(np.array(uv_faces, dtype=np.int64), len(uvs), source),
    )


def format_obj(mesh: ObjMesh) -> str:
    """The OBJ text of a mesh; float32 values are read back exactly."""
    lines = [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"vt {u:.9g} {v:.9g}" for u, v in mesh.uvs.tolist()]
    corners = np.stack([mesh.faces + 1, mesh.uv_faces + 1], axis=-1).tolist()
    lines += ["f " + " ".join(f"{vertex}/{uv}" for vertex, uv in face) for face in corners]
    return "\n".join(lines) + "\n"


def _zero_based(indices: np.ndarray, count: int, source: str) -> np.ndarray:
    indices = np.where(indices < 0, indices + count, indices - 1)
    if indices.min() < 0 or indices.max() >= count:
        raise CaptureError(f"{source}: a face refers to element {int(indices.max()) + 1} of {count}")
    return indices
