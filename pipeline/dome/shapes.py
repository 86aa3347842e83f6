"""Expression shapes and landmarks of the procedural head: smooth displacement fields over its neutral shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.dome.head import EYE_CENTRE, LID_RADIUS, HeadGrid, bump, smoothstep, web_ladders
from pipeline.driving.landmarks import nearest_vertices

_LIP_Y = -52.0
_JAW_HINGE_YZ = (-38.0, -32.0)
_JAW_OPEN_RAD = 0.31
# How much a level of the mouth's web follows the upper and the lower lip: teeth stay with the skull.
_WEB_UPPER = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 1.0])
_WEB_LOWER = np.array([1.0, 0.9, 0.75, 0.2, 0.0, 0.0, 0.0])


def expression_deltas(head: HeadGrid) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and offsets ``(E, V, 3)`` mm of all shapes."""
    field = _Fields(head)
    shapes: dict[str, Callable[[], np.ndarray]] = {
        "jawOpen": lambda: field.jaw_rotation(_JAW_OPEN_RAD),
        "jawLeft": lambda: field.jaw_shift(7.0),
        "jawRight": lambda: field.jaw_shift(-7.0),
        "mouthPucker": field.pucker,
        "mouthFunnel": field.funnel,
        "browInnerUp": lambda: field.push((0.0, 44.0), (17.0, 15.0), (0.0, 7.5, 1.0)),
    }
    for name, sign in (("Left", 1.0), ("Right", -1.0)):
        field_side = field.on_side(sign)
        shapes |= {f"{shape}{name}": make for shape, make in field_side.items()}
    return tuple(shapes), np.stack([make() for make in shapes.values()])


class _Fields:
    """Displacement fields over one head; all return ``(V, 3)`` mm."""

    def __init__(self, head: HeadGrid):
        self.head = head
        self.x, self.y, self.z = head.neutral.T
        self.front = smoothstep(-45.0, 10.0, self.z)
        mouth = head.slit == 0
        self.corner = np.abs(head.neutral[mouth, 0]).max()
        self.below = np.where(mouth, 1.0 - head.level, (head.base[:, 1] < _LIP_Y).astype(float))
        self.mouth_ladders = web_ladders(head.base, head.slit, head.level, 0)
        self.jaw = self._jaw_weight()

    def on_side(self, sign: float) -> dict[str, Callable[[], np.ndarray]]:
        """Shapes of one half of the face; ``sign`` is +1 for the subject's left."""

        def push(centre, width, offset, **options):
            return self.push(centre, width, (sign * offset[0], *offset[1:]), sign=sign, **options)

        return {
            "mouthSmile": lambda: (
                push((27.0, -52.0), (17.0, 15.0), (8.0, 9.0, -5.0))
                + push((41.0, -18.0), (17.0, 14.0), (0.5, 4.0, 3.5))
                + push((33.0, 13.0), (14.0, 6.0), (0.0, 1.6, 0.6))
            ),
            "mouthFrown": lambda: push((27.0, -54.0), (14.0, 14.0), (1.0, -8.5, -1.0)),
            "mouthStretch": lambda: push((28.0, -56.0), (17.0, 18.0), (10.0, -3.5, -5.0)),
            "mouthUpperUp": lambda: push((11.0, -44.0), (11.0, 9.0), (0.0, 6.0, 1.0), lip=-1),
            "mouthLowerDown": lambda: push((11.0, -60.0), (11.0, 10.0), (0.0, -6.5, 0.5), lip=1),
            "noseSneer": lambda: (
                push((14.0, -14.0), (8.0, 9.0), (1.0, 5.0, 0.5))
                + push((13.0, -42.0), (11.0, 9.0), (0.0, 3.5, 0.5), lip=-1)
                + push((10.0, 14.0), (7.0, 10.0), (0.0, 2.0, 1.0))
            ),
            "cheekPuff": lambda: push((43.0, -46.0), (19.0, 21.0), (7.0, 0.0, 11.0)),
            "cheekSquint": lambda: push((40.0, -4.0), (15.0, 12.0), (0.0, 5.0, 2.5)),
            "browDown": lambda: push((23.0, 43.0), (16.0, 10.0), (-3.0, -6.0, 1.2)),
            "browOuterUp": lambda: push((41.0, 46.0), (15.0, 15.0), (0.5, 8.0, -0.5)),
            "eyeBlink": lambda: self.lids(sign, upper=1.0, lower=0.12),
            "eyeWide": lambda: self.lids(sign, upper=-0.32, lower=-0.1),
            "eyeSquint": lambda: (
                self.lids(sign, upper=0.18, lower=0.34) + push((33.0, 10.0), (15.0, 7.0), (0.0, 2.2, 1.0))
            ),
        }

    def push(
        self,
        centre: tuple[float, float],
        width: tuple[float, float],
        offset: tuple[float, float, float],
        *,
        sign: float = 0.0,
        lip: int = 0,
    ) -> np.ndarray:
        """A Gaussian push of the skin in front.

        Args:
            centre: in the frontal plane of the subject's left, mm.
            width: of the Gaussian, mm.
            offset: at its centre, mm.
            sign: the half of the face that moves, fading over the midline; 0 for both.
            lip: -1 for the upper lip alone, 1 for the lower; 0 for both.
        """
        side = np.abs(self.x) if sign == 0 else sign * self.x
        weight = bump(side, self.y, centre, width) * self.front
        if sign:
            weight = weight * smoothstep(-7.0, 7.0, side)
        if lip:
            weight = weight * (self.below if lip > 0 else 1.0 - self.below) * (1.0 - 0.5 * self._at_corner())
        return self._dress_webs(weight[:, None] * np.array(offset))

    def _at_corner(self) -> np.ndarray:
        return ((self.head.slit == 0) & (self.head.level == 0.5) & (np.abs(self.x) > self.corner - 1e-6)).astype(float)

    def _jaw_weight(self) -> np.ndarray:
        below = np.where(self.below > 0.5, 1.0, -1.0)
        below = np.where(self._at_corner() > 0, 0.0, below)
        distance = np.abs(_LIP_Y - self.head.base[:, 1])
        opening = np.sqrt(np.clip(1.0 - (self.x / self.corner) ** 2, 0.0, 1.0))
        reach = np.where(below > 0, 26.0, 17.0)
        fade = opening + (1.0 - opening) * (1.0 - np.exp(-((distance / reach) ** 1.0)))
        weight = 0.5 + 0.5 * below * fade
        weight = weight * smoothstep(-55.0, -5.0, self.z) * smoothstep(-172.0, -108.0, self.y)
        return weight * smoothstep(2.0, -38.0, self.y)

    def jaw_rotation(self, angle: float) -> np.ndarray:
        """The jaw turned open about its hinge."""
        y, z = self.y - _JAW_HINGE_YZ[0], self.z - _JAW_HINGE_YZ[1]
        cosine, sine = np.cos(angle), np.sin(angle)
        offset = np.stack([0 * y, y * cosine - z * sine - y, z * cosine + y * sine - z], axis=-1)
        # A chin that goes down also narrows the mouth a little.
        offset[:, 0] -= 0.1 * self.x * bump(self.x, self.y, (0.0, -56.0), (32.0, 24.0))
        return self._dress_webs(self.jaw[:, None] * offset)

    def jaw_shift(self, shift_mm: float) -> np.ndarray:
        """The jaw moved sideways, mm."""
        return self._dress_webs(self.jaw[:, None] * [shift_mm, 0.0, 0.0])

    def pucker(self) -> np.ndarray:
        """Lips drawn together and forward."""
        weight = bump(self.x, self.y, (0.0, -52.0), (33.0, 20.0)) * self.front
        offset = np.stack([-0.6 * self.x, -0.12 * (self.y - _LIP_Y), 9.0 - 0.004 * self.x**2], axis=-1)
        return self._dress_webs(weight[:, None] * offset)

    def funnel(self) -> np.ndarray:
        """Lips open, round and forward."""
        weight = bump(self.x, self.y, (0.0, -52.0), (26.0, 20.0)) * self.front
        opening = np.sqrt(np.clip(1.0 - (self.x / self.corner) ** 2, 0.0, 1.0))
        vertical = np.where(self.below > 0.5, -6.5, 4.5) * opening
        offset = np.stack([-0.36 * self.x, vertical, np.full_like(self.x, 6.5)], axis=-1)
        return self._dress_webs(weight[:, None] * offset)

    def lids(self, sign: float, upper: float, lower: float) -> np.ndarray:
        """Lids moved along the eyeball; 1 and 0 (or any two that sum to 1) close the eye.

        Args:
            sign: +1 for the subject's left eye.
            upper: share of the opening that the upper lid travels down.
            lower: share that the lower lid travels up.
        """
        index = 1 if sign > 0 else 2
        head = self.head
        lower = lower if upper < 1 else 1.0 - (upper := 1.0 - lower)
        centre = EYE_CENTRE * [sign, 1.0, 1.0]
        rim = web_ladders(head.base, head.slit, head.level, index)
        columns = np.array([sign * head.base[low, 0] for _, low, _ in rim])
        gap = np.array([self.y[high] - self.y[low] for _, low, high in rim])
        rim_y = {
            "low": np.array([self.y[low] for _, low, _ in rim]),
            "high": np.array([self.y[high] for _, _, high in rim]),
        }
        order = np.argsort(columns)
        opening = np.interp(sign * head.base[:, 0], columns[order], gap[order], left=0.0, right=0.0)
        low_y = np.interp(sign * head.base[:, 0], columns[order], rim_y["low"][order])
        high_y = np.interp(sign * head.base[:, 0], columns[order], rim_y["high"][order])
        on_slit = head.slit == index
        above = np.where(on_slit, head.level > 0.5, self.y > 0.5 * (low_y + high_y))
        from_rim = np.where(above, self.y - high_y, low_y - self.y)
        from_rim = np.where(on_slit, 0.0, np.clip(from_rim, 0.0, None))
        fade = np.exp(-((from_rim / np.where(above, 7.5, 6.5)) ** 2)) * (sign * self.x > 0) * (self.z > 0)
        delta_y = np.where(above, -upper, lower) * opening * fade
        # Follow the eyeball: the change of its depth between the old and the new height, where the lid lies on it.
        old, new = self._ball_depth(centre, self.y), self._ball_depth(centre, self.y + delta_y)
        on_ball = np.exp(-((from_rim / 6.0) ** 2))
        delta = np.stack([0 * delta_y, delta_y, (new - old) * on_ball * (np.abs(delta_y) > 1e-9)], axis=-1)
        for members, low, high in rim:
            weight = head.level[members][:, None]
            delta[members] = (1.0 - weight) * delta[low] + weight * delta[high]
        return delta

    def _ball_depth(self, centre: np.ndarray, y: np.ndarray) -> np.ndarray:
        distance = np.hypot(self.x - centre[0], y - centre[1])
        return np.sqrt(np.clip(LID_RADIUS**2 - distance**2, 0.0, None))

    def _dress_webs(self, delta: np.ndarray) -> np.ndarray:
        """Give webs the motion of their rims; the teeth's level stays with the skull in the middle."""
        delta = delta.copy()
        head = self.head
        steps = np.linspace(0.0, 1.0, len(_WEB_UPPER))
        for members, low, high in self.mouth_ladders:
            upper = np.interp(head.level[members], steps, _WEB_UPPER)[:, None]
            lower = np.interp(head.level[members], steps, _WEB_LOWER)[:, None]
            # Towards its corners, and sideways, everything goes with the lips: the web would come through them.
            aside = (self.x[high] / self.corner) ** 2
            with_lips = np.where(head.level[members, None] >= 0.5, delta[high], delta[low])
            delta[members] = (1 - aside) * (upper * delta[high] + lower * delta[low]) + aside * with_lips
            delta[members, 0] = with_lips[:, 0]
        for index in (1, 2):
            for members, low, high in web_ladders(head.base, head.slit, head.level, index):
                weight = head.level[members][:, None]
                delta[members] = (1.0 - weight) * delta[low] + weight * delta[high]
        return delta


def procedural_landmarks(head: HeadGrid) -> dict[str, int]:
    """Vertex of every landmark: rims of the slits, and the vertices nearest to known places of the sculpture."""
    points = head.neutral
    found: dict[str, int] = {}
    for index, side, sign in ((1, "left", 1.0), (2, "right", -1.0)):
        rim = [(sign * points[low, 0], low, high) for _, low, high in _rim(head, index)]
        rim.sort()
        corners = np.flatnonzero((head.slit == index) & (head.level == 0.5))
        corners = corners[np.argsort(np.abs(points[corners, 0]))]
        found[f"eye_{side}_inner"], found[f"eye_{side}_outer"] = int(corners[0]), int(corners[-1])
        _, found[f"eye_{side}_lower"], found[f"eye_{side}_upper"] = rim[len(rim) // 2]
        for place, x, y in (("inner", 11.0, 41.0), ("middle", 28.0, 46.5), ("outer", 47.0, 41.0)):
            found[f"brow_{side}_{place}"] = _front_vertex(head, sign * x, y)
        found[f"nose_wing_{side}"] = _front_vertex(head, sign * 16.5, -14.0)
        found[f"lip_corner_{side}"] = int(np.argmax(np.where(head.slit == 0, sign * points[:, 0], -np.inf)))
    for name, x in (("", 0.0), ("_left", 13.0), ("_right", -13.0)):
        found[f"lip_lower{name}"] = _front_vertex(head, x, -58.0)
        found[f"lip_upper{name}"] = _front_vertex(head, x, -46.5)
    found["nose_tip"] = int(np.argmax(points[:, 2]))
    found["nose_bridge"] = _front_vertex(head, 0.0, 22.0)
    found["chin"] = _front_vertex(head, 0.0, -100.0)
    return found


def _rim(head: HeadGrid, index: int) -> list[tuple[np.ndarray, int, int]]:
    return web_ladders(head.base, head.slit, head.level, index)


def _front_vertex(head: HeadGrid, x: float, y: float) -> int:
    candidates = np.flatnonzero((head.neutral[:, 2] > 0) & (head.slit < 0))
    return int(nearest_vertices(np.array([[x, y]]), head.neutral[:, :2], candidates)[0])
