"""The meshes and cameras that ``render.py`` draws, as files that any row's interpreter can read."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lipflow.types import Topology
from pipeline.dome.face import procedural_face
from pipeline.dome.realface import load_realface
from pipeline.dome.rig import arc_rig

SIZES_HW = ((256, 256), (1024, 667), (2048, 1334))
VIEWS = 16
_TEXTURE_SIZE = 1024


@dataclass(frozen=True)
class Mesh:
    """A mesh with its texture.

    Attributes:
        name: in the tables.
        vertices: ``(V, 3)`` float32, mm, head frame.
        topology: of the mesh.
        texture: ``(3, T, T)`` float32 in 0..1, row 0 is v = 0.
    """

    name: str
    vertices: np.ndarray
    topology: Topology
    texture: np.ndarray


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        scene: file that :func:`write_scene` wrote.
        mesh: name of the mesh.
        size_hw: of the pictures.
        views: pictures in a batch, of one frame.
        backward: whether gradients to vertices and texture are computed, too.
    """

    scene: Path
    mesh: str
    size_hw: tuple[int, int]
    views: int
    backward: bool


def face_mesh(folder: Path | None) -> Mesh:
    """The real face (11,432 triangles), or the procedural head where its folder is not here."""
    face = procedural_face(_TEXTURE_SIZE) if folder is None else load_realface(folder)
    texture = face.texture.transpose(2, 0, 1).astype(np.float32) / 255
    name = "procedural head" if folder is None else "realface"
    return Mesh(f"{name}, {len(face.topology.faces):,}", face.neutral, face.topology, np.ascontiguousarray(texture))


def ball_mesh(rings: int, columns: int, radius_mm: float = 110) -> Mesh:
    """A bumpy ball, of a head's size by default, with ``2 (rings - 1) columns`` triangles and a texture of noise."""
    polar, azimuth = np.meshgrid(np.linspace(0.02, 3.1, rings), np.arange(columns) / columns * 2 * np.pi, indexing="ij")
    radius = radius_mm * (1 + 0.06 * np.sin(5 * polar) * np.sin(6 * azimuth))
    ring = np.sin(polar)
    vertices = (radius * np.stack([ring * np.sin(azimuth), np.cos(polar), ring * np.cos(azimuth)])).reshape(3, -1).T
    row, column = (index.ravel() for index in np.mgrid[: rings - 1, :columns])
    quads = [row * columns + column, row * columns + (column + 1) % columns]
    quads += [quads[1] + columns, quads[0] + columns]
    places = row * (columns + 1) + column
    uv_quads = [places, places + 1, places + columns + 2, places + columns + 1]
    v, u = np.meshgrid(np.linspace(0, 1, rings), np.linspace(0, 1, columns + 1), indexing="ij")
    faces, uv_faces = (
        np.concatenate([np.stack([q[0], q[3], q[2]], 1), np.stack([q[0], q[2], q[1]], 1)]) for q in (quads, uv_quads)
    )
    topology = Topology(
        faces.astype(np.int64),
        np.stack([u, v], -1).reshape(-1, 2).astype(np.float32),
        uv_faces.astype(np.int64),
        np.ones((64, 64), np.float32),
        {},
        len(vertices),
    )
    texture = np.random.default_rng(0).random((3, _TEXTURE_SIZE, _TEXTURE_SIZE), np.float32)
    return Mesh(f"ball, {len(faces):,}", vertices.astype(np.float32), topology, texture)


def write_scene(mesh: Mesh, size_hw: tuple[int, int], folder: Path) -> Path:
    """One ``.npz`` with the mesh, its texture, and :data:`VIEWS` cameras of a dome, the frontal one first."""
    cameras, world_from_head = arc_rig(VIEWS, size_hw, seed=0)
    rotation, translation = world_from_head[:, :3], world_from_head[:, 3]
    poses = []
    for camera in cameras:
        cam_rotation = camera.cam_from_world[:, :3]
        shift = cam_rotation @ translation + camera.cam_from_world[:, 3]
        poses.append(np.concatenate([cam_rotation @ rotation, shift[:, None]], 1))
    topology = mesh.topology
    handle, path = tempfile.mkstemp(".npz", "scene-", folder)
    os.close(handle)
    np.savez(
        path,
        vertices=mesh.vertices,
        faces=topology.faces,
        uvs=topology.uvs,
        uv_faces=topology.uv_faces,
        texture=mesh.texture,
        intrinsics=np.stack([camera.intrinsics for camera in cameras]).astype(np.float32),
        cam_from_head=np.stack(poses).astype(np.float32),
        size_hw=np.array(size_hw),
    )
    return Path(path)


def write_cases(cases: list[Case], path: Path) -> Path:
    """The list of cases that a row serves in turn, pass by pass."""
    listed = [{"scene": str(case.scene), "views": case.views, "backward": case.backward} for case in cases]
    path.write_text(json.dumps(listed))
    return path
