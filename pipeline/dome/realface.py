"""Loader of a real face asset pack in the Multiface topology (``topology.npz``, ``base.npz``, ...).

The landmarks are derived from the asset's geometry: the rims of its mouth and eye webs, and extreme points of the
nose and chin; brows and nose wings are taken from their places in the Multiface atlas, which is the same for
every capture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lipflow.errors import CaptureError
from lipflow.types import Topology
from pipeline.dome.face import FaceAsset
from pipeline.driving.landmarks import LANDMARK_NAMES, nearest_vertices

_FILES = ("topology.npz", "base.npz", "expressions.npz", "texture.png", "weight_mask.png")
_PLAIN_SKIN_LEVEL = 64.0
"""Level of the 8-bit mask that counts as weight 1: cheeks and forehead lie near it, eyes and mouth near 4 times it,
the back of the head at a quarter."""

# Places (u, v) of landmarks in the Multiface atlas; the subject's right is on its left.
_ATLAS_PLACES = {
    "brow_right_outer": (0.318, 0.724),
    "brow_right_middle": (0.372, 0.752),
    "brow_right_inner": (0.446, 0.751),
    "brow_left_inner": (0.572, 0.751),
    "brow_left_middle": (0.640, 0.752),
    "brow_left_outer": (0.692, 0.724),
    "nose_wing_right": (0.458, 0.524),
    "nose_wing_left": (0.551, 0.524),
    "nose_bridge": (0.503, 0.690),
}
_OPEN_JAW = 0.5
_ON_LIP_MM = 5.0
_CHIN_TO_NOSE = 1.2
"""Height of the chin below the lips, over that of the nose above them."""


def load_realface(folder: str | Path) -> FaceAsset:
    """Read the asset; its neutral is ``verts_neutral``.

    Raises:
        CaptureError: a file is missing, or the arrays do not fit together.
    """
    folder = Path(folder)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise CaptureError(f"{folder}: not a face asset: {', '.join(missing)} missing; expected {', '.join(_FILES)}")
    mesh, base, shapes = (_arrays(folder / name) for name in _FILES[:3])
    neutral = base["verts_neutral"].astype(np.float32)
    deltas, names = shapes["deltas"].astype(np.float32), tuple(str(name) for name in shapes["names"])
    if deltas.shape != (len(names), *neutral.shape) or mesh["faces"].max() >= len(neutral):
        raise CaptureError(f"{folder}: deltas {deltas.shape}, {len(names)} names and {neutral.shape} do not fit")
    with Image.open(folder / "texture.png") as image:
        texture = np.ascontiguousarray(np.asarray(image.convert("RGB"))[::-1])
    with Image.open(folder / "weight_mask.png") as image:
        mask = np.asarray(image.convert("L"), dtype=np.float32)[::-1] / _PLAIN_SKIN_LEVEL
    webs = {name: mesh[f"web_{name}"].astype(np.int64) for name in ("mouth", "eye_left", "eye_right")}
    faces, uv_faces = mesh["faces"].astype(np.int64), mesh["uv_faces"].astype(np.int64)
    opened = neutral + _OPEN_JAW * deltas[names.index("jawOpen")]
    found = _landmarks(neutral, opened, faces, mesh["uvs"], uv_faces, webs)
    return FaceAsset(
        topology=Topology(
            faces=faces,
            uvs=mesh["uvs"].astype(np.float32),
            uv_faces=uv_faces,
            weight_mask=np.ascontiguousarray(mask),
            landmarks={name: found[name] for name in LANDMARK_NAMES},
            num_vertices=len(neutral),
        ),
        neutral=neutral,
        deltas=deltas,
        names=names,
        texture=texture,
        webs=webs,
        license="CC BY-NC 4.0, Meta Platforms, Inc. (Ava-256, Multiface); shapes from ICT-FaceKit, MIT.",
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _landmarks(
    neutral: np.ndarray,
    opened: np.ndarray,
    faces: np.ndarray,
    uvs: np.ndarray,
    uv_faces: np.ndarray,
    webs: dict[str, np.ndarray],
) -> dict[str, int]:
    found: dict[str, int] = {}
    for side, sign in (("left", 1.0), ("right", -1.0)):
        rim = np.unique(faces[webs[f"eye_{side}"]])
        x = sign * neutral[rim, 0]
        found[f"eye_{side}_inner"], found[f"eye_{side}_outer"] = int(rim[x.argmin()]), int(rim[x.argmax()])
        middle = 0.5 * (x.min() + x.max())
        found[f"eye_{side}_lower"], found[f"eye_{side}_upper"] = _low_and_high(rim, x, neutral[rim, 1], middle)
    # With closed lips the rims coincide: they are told apart with the jaw open.
    rim = np.unique(faces[webs["mouth"]])
    x = neutral[rim, 0]
    found["lip_corner_left"], found["lip_corner_right"] = int(rim[x.argmax()]), int(rim[x.argmin()])
    used = np.unique(faces)
    skin = np.setdiff1d(used, rim)
    half = 0.25 * (x.max() - x.min())
    for name, place in (("", 0.0), ("_left", half), ("_right", -half)):
        low, high = _low_and_high(rim, x, opened[rim, 1], place + 0.5 * (x.max() + x.min()))
        targets = neutral[[low, high]] + np.array([[0.0, -_ON_LIP_MM, 2.0], [0.0, _ON_LIP_MM, 2.0]])
        on_lips = nearest_vertices(targets, neutral, skin)
        found[f"lip_lower{name}"], found[f"lip_upper{name}"] = int(on_lips[0]), int(on_lips[1])
    front = used[np.abs(neutral[used, 0]) < 12.0]
    found["nose_tip"] = int(front[neutral[front, 2].argmax()])
    lip_y = 0.5 * (neutral[found["lip_lower"], 1] + neutral[found["lip_upper"], 1])
    chin_y = lip_y - _CHIN_TO_NOSE * (neutral[found["nose_tip"], 1] - lip_y)
    before = front[neutral[front, 2] > 0]
    found["chin"] = int(nearest_vertices(np.array([[0.0, chin_y]]), neutral[:, :2], before)[0])
    uv_of_vertex = np.zeros((len(neutral), 2))
    uv_of_vertex[faces.ravel()] = uvs[uv_faces.ravel()]
    places = nearest_vertices(np.array(list(_ATLAS_PLACES.values())), uv_of_vertex, used)
    return found | {name: int(vertex) for name, vertex in zip(_ATLAS_PLACES, places, strict=True)}


def _low_and_high(rim: np.ndarray, x: np.ndarray, y: np.ndarray, place: float) -> tuple[int, int]:
    """The rim's lower and upper vertex nearest to ``x = place``."""
    centre = 0.5 * (y.min() + y.max())
    below, above = np.flatnonzero(y < centre), np.flatnonzero(y >= centre)
    low, high = below[np.abs(x[below] - place).argmin()], above[np.abs(x[above] - place).argmin()]
    return int(rim[low]), int(rim[high])
