"""Geometry of the procedural head: a lofted grid with slits for the mouth and the eyes, sculpted by smooth fields.

The head is a stack of closed horizontal curves (*stations*, keyed by the height of their foremost point), cut into
columns by azimuth; rows and columns are dense where the face is detailed. Three slits are cut along grid rows, and
each is closed again by a *web* of inner rows: an eyeball patch behind the lids, a pocket with teeth behind the
lips. Texture coordinates are the grid's own, with the slits pulled open, so that the atlas is one chart. All
lengths are millimetres; head frame: +x the subject's left, +y up, +z out of the face.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.dome.grid import SLITS, GridBuilder

# Height of the foremost point, its z; height and z of the rearmost point; height and half width at the side; z of
# the widest place; exponent of the superellipse.
_STATIONS = np.array(
    [
        # front y, front z, rear y, rear z, side y, half width, mid z, exponent
        [-205.0, -6.0, -205.0, -112.0, -205.0, 62.0, -50.0, 2.0],
        [-160.0, -8.0, -160.0, -104.0, -160.0, 55.0, -48.0, 2.0],
        [-135.0, -6.0, -134.0, -101.0, -130.0, 54.0, -44.0, 2.0],
        [-124.0, 4.0, -116.0, -101.0, -110.0, 56.0, -38.0, 2.0],
        [-118.0, 24.0, -104.0, -102.0, -94.0, 55.0, -32.0, 1.92],
        [-112.0, 42.0, -96.0, -104.0, -84.0, 57.0, -29.0, 1.9],
        [-102.0, 50.0, -88.0, -106.0, -74.0, 60.0, -28.0, 1.88],
        [-82.0, 51.0, -72.0, -111.0, -60.0, 65.0, -27.0, 1.92],
        [-52.0, 54.0, -50.0, -121.0, -42.0, 70.0, -27.0, 2.05],
        [-25.0, 53.0, -28.0, -131.0, -22.0, 74.0, -29.0, 2.15],
        [0.0, 53.0, -6.0, -141.0, -2.0, 76.5, -31.0, 2.2],
        [25.0, 54.0, 16.0, -147.0, 20.0, 77.0, -33.0, 2.25],
        [45.0, 58.5, 38.0, -150.0, 40.0, 78.0, -36.0, 2.3],
        [75.0, 57.0, 66.0, -147.0, 66.0, 78.0, -40.0, 2.25],
        [100.0, 47.0, 96.0, -134.0, 93.0, 75.0, -42.0, 2.2],
        [122.0, 31.0, 121.0, -114.0, 119.0, 66.0, -42.0, 2.15],
        [138.0, 9.0, 138.0, -91.0, 137.0, 50.0, -41.0, 2.1],
        [147.0, -16.0, 147.0, -65.0, 147.0, 26.0, -40.0, 2.0],
    ]
)
_CROWN = np.array([0.0, 150.0, -40.0])

_ROWS_BELOW_MOUTH = (
    *(-205.0, -186.0, -168.0, -152.0, -140.0, -131.0, -124.0, -119.0, -115.0, -110.0, -104.0, -97.0, -90.0, -83.0),
    *(-77.0, -71.5, -67.0, -63.0, -59.5, -56.5, -54.0),
)
_MOUTH_Y = -52.0
_ROWS_MOUTH_TO_EYE = (
    *(
        -50.0,
        -47.5,
        -44.5,
        -41.0,
        -37.0,
        -32.5,
        -28.5,
        -25.0,
        -22.0,
        -19.0,
        -16.0,
        -12.5,
        -8.5,
        -4.0,
        1.0,
        6.0,
        11.0,
    ),
    *(15.5, 19.0, 22.0),
)
_EYE_Y = 25.0
_ROWS_ABOVE_EYE = (
    *(27.5, 30.5, 34.0, 38.0, 42.0, 46.0, 50.5, 56.0, 63.0, 71.0, 80.0, 90.0, 101.0, 112.0, 122.0, 131.0, 138.5),
    *(143.5, 147.0),
)
_COLUMNS_DEG = (
    *(0.0, 2.2, 4.5, 7.0, 9.7, 12.5, 15.5, 18.5, 21.5, 24.5, 27.5, 30.5, 33.5, 37.0, 41.0, 46.0, 52.0, 60.0, 69.0),
    *(77.0, 82.0, 86.0, 90.0, 94.0, 98.0, 102.0, 106.5, 113.0, 124.0, 140.0, 160.0, 180.0),
)

_MOUTH_CORNER_DEG = 21.5
_EYE_CORNERS_DEG = (9.7, 33.5)

EYE_CENTRE = np.array([31.5, 25.0, 30.0])
_EYEBALL_RADIUS = 12.4
LID_RADIUS = 13.4
_UPPER_LID_MM, _LOWER_LID_MM = 6.0, 4.3
# Offsets (y, z) of the mouth web behind the lips, by level from the lower lip to the upper: lower lip's inside, the
# pocket's floor and back, the cutting edge of the upper teeth, their root, the upper lip.
_POCKET_YZ = np.array([[0.0, 0.0], [-1.5, -5.0], [-3.0, -17.0], [-2.0, -15.0], [-4.5, -6.5], [2.0, -5.5], [0.0, 0.0]])
# How far the slits are pulled open in the atlas, in rows.
_UV_OPENING_ROWS = {"mouth": (2.0, 2.0), "eye_left": (2.0, 1.6), "eye_right": (2.0, 1.6)}


@dataclass(frozen=True)
class HeadGrid:
    """The procedural head's connectivity and its neutral shape.

    Attributes:
        neutral: ``(V, 3)`` float64, mm.
        faces: ``(F, 3)`` int64, counter-clockwise from outside.
        uvs: ``(U, 2)`` float64.
        uv_faces: ``(F, 3)`` int64.
        slit: ``(V,)`` int, index into ``SLITS`` of vertices on a slit's rim or web, -1 elsewhere.
        level: ``(V,)`` 0 on the lower rim of a slit, 1 on the upper rim, between on the web; 0.5 elsewhere.
        base: ``(V, 3)`` the loft without sculpting: smooth coordinates for fields.
        webs: slit name to the indices of the faces that close it.
    """

    neutral: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    uv_faces: np.ndarray
    slit: np.ndarray
    level: np.ndarray
    base: np.ndarray
    webs: dict[str, np.ndarray]


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below ``low``, 1 above ``high`` (or the reverse where ``low > high``), smooth between."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def bump(x: np.ndarray, y: np.ndarray, centre: tuple[float, float], width: tuple[float, float]) -> np.ndarray:
    """A Gaussian of height 1 in the frontal plane."""
    return np.exp(-(((x - centre[0]) / width[0]) ** 2) - ((y - centre[1]) / width[1]) ** 2)


def build_head() -> HeadGrid:
    """The whole head: connectivity, atlas and the sculpted neutral shape."""
    rows = np.array([*_ROWS_BELOW_MOUTH, _MOUTH_Y, *_ROWS_MOUTH_TO_EYE, _EYE_Y, *_ROWS_ABOVE_EYE])
    half = np.array(_COLUMNS_DEG)
    columns = np.concatenate([-half[:0:-1], half])
    builder = GridBuilder(rows, columns)
    builder.cut("mouth", _MOUTH_Y, -_MOUTH_CORNER_DEG, _MOUTH_CORNER_DEG)
    builder.cut("eye_left", _EYE_Y, _EYE_CORNERS_DEG[0], _EYE_CORNERS_DEG[1])
    builder.cut("eye_right", _EYE_Y, -_EYE_CORNERS_DEG[1], -_EYE_CORNERS_DEG[0])
    builder.fill()
    row, column, slit, level = (np.array(values) for values in zip(*builder.vertices, strict=True))
    base = _loft(rows[np.minimum(row, len(rows) - 1)], np.radians(columns[column]))
    base[row == len(rows)] = _CROWN
    return HeadGrid(
        neutral=_sculpt(base, slit, level),
        faces=np.array(builder.faces, dtype=np.int64),
        uvs=_atlas(builder, row, slit, level, base),
        uv_faces=np.array(builder.uv_faces, dtype=np.int64),
        slit=slit,
        level=level,
        base=base,
        webs={name: np.array(faces, dtype=np.int64) for name, faces in builder.webs.items()},
    )


def _loft(front_y: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    """Points of the unsculpted head ``(N, 3)``."""
    _, front_z, rear_y, rear_z, side_y, half_width, mid_z, exponent = (
        _cubic(_STATIONS[:, 0], _STATIONS[:, k], front_y) for k in range(_STATIONS.shape[1])
    )
    sine, cosine = np.sin(azimuth), np.cos(azimuth)
    x = half_width * np.sign(sine) * np.abs(sine) ** (2.0 / exponent)
    reach = np.abs(cosine) ** (2.0 / exponent)
    z = mid_z + reach * np.where(cosine >= 0, front_z - mid_z, rear_z - mid_z)
    y = side_y + cosine**2 * np.where(cosine >= 0, front_y - side_y, rear_y - side_y)
    return np.stack([x, y, z], axis=-1)


def _cubic(knots: np.ndarray, values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Monotone piecewise cubic interpolation (Fritsch and Butland): no overshoot between stations."""
    step, slope = np.diff(knots), np.diff(values) / np.diff(knots)
    same_sign = slope[:-1] * slope[1:] > 0
    total = np.where(same_sign, slope[:-1] + slope[1:], 1.0)
    inner = np.where(same_sign, 2.0 * slope[:-1] * slope[1:] / total, 0.0)
    tangent = np.concatenate([slope[:1], inner, slope[-1:]])
    i = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    t, h = (x - knots[i]) / step[i], step[i]
    return (
        values[i] * (1 + 2 * t) * (1 - t) ** 2
        + values[i + 1] * t**2 * (3 - 2 * t)
        + h * tangent[i] * t * (1 - t) ** 2
        - h * tangent[i + 1] * t**2 * (1 - t)
    )


def _sculpt(base: np.ndarray, slit: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The neutral head: brow, sockets, cheeks, nose, lips, chin, ears, eyes."""
    x, y, z = base.T.copy()
    side = np.abs(x)
    front = smoothstep(-30.0, 5.0, z)
    z = z + front * (
        2.5 * bump(side, y, (22.0, 48.0), (20.0, 11.0))
        - 9.5 * bump(side, y, (32.0, 26.0), (16.0, 13.0))
        - 3.0 * bump(side, y, (14.0, 20.0), (6.0, 13.0))
        + 6.0 * bump(side, y, (42.0, -6.0), (17.0, 15.0))
        - 3.5 * bump(side, y, (44.0, -46.0), (15.0, 18.0))
        + 7.0 * bump(x, y, (0.0, -97.0), (17.0, 12.0))
        - 3.5 * bump(x, y, (0.0, -74.0), (20.0, 6.0))
        + 5.0 * bump(x, y, (0.0, -46.0), (26.0, 20.0))
    )
    z = z + _nose(side, y)
    y = y - 0.16 * _nose(side, y) * smoothstep(-24.0, -4.0, y) * smoothstep(12.0, -4.0, y)
    z = z + front * _lips(side, y, slit == 0)
    x, z = _ears(x, y, z)
    points = np.stack([x, y, z], axis=-1)
    points = _open_eyes(points, base, slit, level)
    return _mouth_pocket(points, slit, level)


def _nose(side: np.ndarray, y: np.ndarray) -> np.ndarray:
    ridge = _cubic(
        np.array([-27.0, -22.0, -18.0, -14.0, -9.0, -4.0, 4.0, 12.0, 20.0, 28.0, 40.0, 44.0]),
        np.array([0.0, 3.5, 11.0, 17.0, 19.5, 18.5, 15.0, 11.5, 8.5, 6.0, 1.0, 0.0]),
        np.clip(y, -27.0, 44.0),
    )
    width = np.interp(y, [-22.0, -12.0, 0.0, 12.0, 26.0, 40.0], [12.0, 12.0, 11.0, 9.5, 10.5, 15.0])
    wings = 8.0 * bump(side, y, (13.5, -13.5), (5.5, 6.0))
    return ridge * np.exp(-(np.abs(side / width) ** 2.2)) + wings


def _lips(side: np.ndarray, y: np.ndarray, on_rim: np.ndarray) -> np.ndarray:
    across = np.sqrt(np.clip(1.0 - (side / 28.0) ** 2, 0.0, 1.0))
    upper = 4.2 * np.exp(-(((y + 47.0) / 4.2) ** 2)) * (y >= _MOUTH_Y - 1.5)
    lower = 5.4 * np.exp(-(((y + 58.0) / 5.0) ** 2)) * (y <= _MOUTH_Y + 1.5)
    philtrum = -1.6 * bump(side, y, (0.0, -38.0), (3.5, 7.0)) + 0.8 * bump(side, y, (5.5, -38.0), (3.0, 8.0))
    return across * (upper + lower - 2.2 * on_rim) + philtrum - 2.5 * bump(side, y, (28.0, -52.0), (4.0, 5.0))


def _ears(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # An egg that leans back: rises from its front edge to a rolled rim, with a hollow in the middle.
    upward = (y - 6.0) / 31.0
    forward = (z + 46.0 - 5.0 * upward) / (17.0 + 3.0 * upward)
    radius = np.hypot(forward, upward)
    inside = smoothstep(1.12, 0.78, radius) * (np.abs(x) > 45.0)
    tilt = smoothstep(0.9, -0.75, forward)
    rim = smoothstep(0.35, 0.8, radius) * smoothstep(0.8, -0.1, forward)
    hollow = np.exp(-((forward / 0.5) ** 2) - ((upward + 0.05) / 0.42) ** 2)
    out = inside * (1.5 + 14.0 * tilt * (0.8 + 0.2 * upward) + 3.5 * rim - 5.0 * hollow)
    return x + np.sign(x) * out, z - inside * 7.0 * tilt


def _open_eyes(points: np.ndarray, base: np.ndarray, slit: np.ndarray, level: np.ndarray) -> np.ndarray:
    points = points.copy()
    for index, sign in ((1, 1.0), (2, -1.0)):
        centre = EYE_CENTRE * [sign, 1.0, 1.0]
        on_slit = slit == index
        inner, outer = np.abs(base[on_slit, 0]).min(), np.abs(base[on_slit, 0]).max()
        fraction = np.clip((sign * base[:, 0] - inner) / (outer - inner), 0.0, 1.0)
        near = (sign * base[:, 0] > 0) & (base[:, 2] > 0)
        arch_up, arch_down = np.sin(np.pi * fraction**0.9), np.sin(np.pi * fraction**1.15)
        above = np.where(on_slit, 0.0, base[:, 1] - _eye_line(base, slit, index))
        up = np.where(on_slit, level, above > 0)
        lift = up * _UPPER_LID_MM * arch_up - (1.0 - up) * _LOWER_LID_MM * arch_down
        lift = lift * np.exp(-((above / 11.0) ** 2))
        canthal = 2.6 * (fraction - 0.35) * np.exp(-((above / 14.0) ** 2)) * smoothstep(62.0, 46.0, sign * base[:, 0])
        points[:, 1] += near * (lift + canthal * smoothstep(6.0, 14.0, sign * base[:, 0]))
        web = on_slit & (level > 0) & (level < 1) & (arch_up > 1e-6)
        lids = near & ~web
        distance = np.hypot(points[:, 0] - centre[0], points[:, 1] - centre[1])
        ball = centre[2] + np.sqrt(np.clip(LID_RADIUS**2 - distance**2, 0.0, None))
        ball = np.where(distance < LID_RADIUS, ball, -1e3)
        points[lids, 2] = _smooth_max(points[lids, 2], ball[lids], 1.6)
        points = _fill_eye_web(points, base, slit, level, index, centre)
    return points


def _eye_line(base: np.ndarray, slit: np.ndarray, index: int) -> np.ndarray:
    """Height of the eye's slit at every vertex' x, before it is opened."""
    rim = base[slit == index]
    order = np.argsort(rim[:, 0])
    return np.interp(base[:, 0], rim[order, 0], rim[order, 1])


def _fill_eye_web(
    points: np.ndarray, base: np.ndarray, slit: np.ndarray, level: np.ndarray, index: int, centre: np.ndarray
) -> np.ndarray:
    for members, rim_low, rim_high in web_ladders(base, slit, level, index):
        weight = level[members][:, None]
        line = (1 - weight) * points[rim_low] + weight * points[rim_high]
        distance = np.hypot(line[:, 0] - centre[0], line[:, 1] - centre[1])
        ball = centre[2] + np.sqrt(np.clip(_EYEBALL_RADIUS**2 - distance**2, 0.0, None))
        line[:, 2] = np.where(distance < _EYEBALL_RADIUS, np.maximum(ball, line[:, 2] - 2.5), line[:, 2] - 1.0)
        points[members] = line
    return points


def web_ladders(base: np.ndarray, slit: np.ndarray, level: np.ndarray, index: int) -> list[tuple[np.ndarray, int, int]]:
    """For every column of a slit: the inner web vertices, the lower rim vertex and the upper rim vertex."""
    members = np.flatnonzero(slit == index)
    ladders = []
    for column_x in np.unique(base[members, 0]):
        column = members[base[members, 0] == column_x]
        if len(column) > 1:
            column = column[np.argsort(level[column])]
            ladders.append((column[1:-1], int(column[0]), int(column[-1])))
    return ladders


def _mouth_pocket(points: np.ndarray, slit: np.ndarray, level: np.ndarray) -> np.ndarray:
    points = points.copy()
    mouth = slit == 0
    corner = np.abs(points[mouth, 0]).max()
    across = np.sqrt(np.clip(1.0 - (points[mouth, 0] / corner) ** 2, 0.0, 1.0))
    bow = 0.9 * np.cos(2.0 * np.pi * points[mouth, 0] / corner) * across
    step = np.linspace(0.0, 1.0, len(_POCKET_YZ))
    points[mouth, 1] += bow + across * np.interp(level[mouth], step, _POCKET_YZ[:, 0])
    points[mouth, 2] += across * np.interp(level[mouth], step, _POCKET_YZ[:, 1])
    return points


def _atlas(builder: GridBuilder, row: np.ndarray, slit: np.ndarray, level: np.ndarray, base: np.ndarray) -> np.ndarray:
    column_of = np.array([column for _, column, _, _ in builder.vertices], dtype=np.float64)
    extra = builder.extra_uvs()
    owner = np.concatenate([np.arange(len(row)), [vertex for vertex, _ in extra]]).astype(int)
    column = np.concatenate([column_of, [c for _, c in extra]])
    height = row.astype(np.float64)
    for name, (up, down) in _UV_OPENING_ROWS.items():
        index = SLITS.index(name)
        rim = slit == index
        low, high = base[rim, 0].min(), base[rim, 0].max()
        arch = np.sin(np.pi * np.clip((base[:, 0] - low) / (high - low), 0.0, 1.0)) ** 0.7 * (base[:, 2] > 0)
        offset = row - float(row[rim].max())
        upper = np.where(rim, level, offset > 0)
        height = height + arch * (upper * up - (1 - upper) * down) * np.exp(-((offset / 4.5) ** 2))
    margin = 0.004
    u = margin + (1 - 2 * margin) * column / (len(builder.columns) - 1)
    v = margin + (1 - 2 * margin) * height / len(builder.rows)
    return np.stack([u, v[owner]], axis=-1)


def _smooth_max(first: np.ndarray, second: np.ndarray, width: float) -> np.ndarray:
    blend = np.clip(width - np.abs(first - second), 0.0, None) / width
    return np.maximum(first, second) + 0.25 * width * blend**2
