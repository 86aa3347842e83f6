"""What a texture looks like from every camera: lights fixed in the world, oily skin, wrinkles and blood.

Per texel: ``albedo x (ambient + sum_j wrapped Lambert) + sum_j Blinn-Phong lobes x Fresnel``. The albedo is dressed
for the expression first: wrinkle lines darken and blood reddens with the shapes that cause them. Nothing casts
shadows but the mouth. The diffuse part is computed once a frame, the highlights once a camera.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lipflow.render.unwrap import Unwrapper, vertex_normals
from pipeline.dome.face import FaceAsset, face_mask
from pipeline.dome.shading import add_view, fill_atlas, highlights, interpolate

_AMBIENT = (0.46, 0.47, 0.49)
# Direction in the frame of the mean head pose; colour of the diffuse part; strength of the highlight.
_LIGHTS = (
    ((-0.55, 0.55, 0.75), (0.50, 0.48, 0.45), 1.0),
    ((0.75, 0.15, 0.65), (0.22, 0.23, 0.26), 0.7),
    ((0.0, 0.95, 0.15), (0.16, 0.16, 0.16), 0.5),
    ((0.9, 0.3, -0.6), (0.16, 0.16, 0.18), 0.0),
    ((-0.9, 0.2, -0.6), (0.16, 0.16, 0.18), 0.0),
)
_WRAP = 0.25
_IN_MOUTH = 0.72
# Shapes that bring a pattern out, by pattern; a name without a side stands for both.
_BLOOD_CAUSES = {
    "cheek": {"mouthSmile": 0.4, "cheekPuff": 0.8, "cheekSquint": 0.4},
    "lips": {"mouthPucker": -0.7, "mouthFunnel": -0.35, "mouthStretch": 0.3, "jawOpen": 0.2},
    "nose": {"noseSneer": 0.35},
}
_WRINKLE_CAUSES = {
    "forehead": {"browInnerUp": 1.0, "browOuterUp": 0.8},
    "glabella": {"browDown": 1.0, "noseSneer": 0.5},
    "crow": {"eyeSquint": 0.9, "mouthSmile": 0.5, "cheekSquint": 0.7, "eyeBlink": 0.3},
    "nasolabial": {"mouthSmile": 1.0, "noseSneer": 0.8, "mouthUpperUp": 0.7, "mouthStretch": 0.4},
}


class Appearance:
    """The skin of one face at one texture size.

    Args:
        face: its landmarks place highlights, wrinkles and blood; its texture is resampled to ``texture_size``.
        texture_size: T.
        mean_head: ``(3, 3)`` rotation of the mean head pose (world from head), in which the lights are placed.
    """

    def __init__(self, face: FaceAsset, texture_size: int, mean_head: np.ndarray):
        self.texture_size = texture_size
        atlas = Unwrapper(face.topology, texture_size)
        self.covered = atlas.covered
        self._faces = atlas.faces
        self._corners = atlas.faces[atlas.triangle_id[self.covered]].numpy()
        self._barycentric = atlas.barycentric[self.covered].numpy()
        self._target, self._source = _nearest_covered(self.covered.numpy())
        texture = torch.from_numpy(face.texture.copy()).permute(2, 0, 1)[None].float()
        if texture.shape[-1] != texture_size:
            texture = functional.interpolate(texture, (texture_size, texture_size), mode="area")
        albedo = texture[0].permute(1, 2, 0)[self.covered]
        self.albedo = albedo * _exposure(albedo)
        self.mouth = self._web(face, "mouth")
        eyes = self._web(face, "eye_left") + self._web(face, "eye_right")
        self.wet = 0.30 * eyes + 0.10 * self.mouth
        self.patterns = _Patterns(face, self._texels(face.neutral)[0].T, (1 - self.mouth) * (1 - eyes))
        directions = torch.tensor([direction for direction, _, _ in _LIGHTS], dtype=torch.float64)
        self._lights_world = functional.normalize(directions, dim=-1) @ torch.from_numpy(mean_head).T
        self._names = face.names

    def _web(self, face: FaceAsset, name: str) -> Tensor:
        return torch.from_numpy(face_mask(face.topology, face.webs[name], self.texture_size))[self.covered]

    def _texels(self, vertices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Positions and unit normals of the covered texels, ``(3, N)`` float32 each."""
        normals = vertex_normals(torch.from_numpy(vertices), self._faces).numpy()
        position, normal = (np.empty((3, len(self._corners)), np.float32) for _ in range(2))
        interpolate(self._corners, self._barycentric, vertices, position)
        interpolate(self._corners, self._barycentric, normals, normal)
        normal /= np.maximum(np.sqrt(np.square(normal).sum(axis=0)), 1e-12)
        return torch.from_numpy(position), torch.from_numpy(normal)

    def light(self, vertices: np.ndarray, weights: np.ndarray, world_from_head: np.ndarray) -> LitSkin:
        """The skin of one frame under the lights.

        Args:
            vertices: ``(V, 3)`` mm, head frame.
            weights: ``(E,)`` expression weights, which bring out wrinkles and blood.
            world_from_head: ``(3, 4)``; turns the lights against the head.
        """
        position, normal = self._texels(vertices)
        lights = (self._lights_world @ torch.from_numpy(world_from_head[:, :3])).float()
        toward_light = normal.T @ lights.T
        colours = torch.tensor([colour for _, colour, _ in _LIGHTS])
        diffuse = torch.tensor(_AMBIENT) + ((toward_light + _WRAP) / (1 + _WRAP)).clamp(min=0) @ colours
        # The pocket behind the lips faces every way: it gets the light that comes in through the mouth instead.
        diffuse = diffuse + self.mouth[:, None] * (_IN_MOUTH - diffuse)
        base = self.patterns.dress(self.albedo, self._names, weights) * diffuse
        return LitSkin(self, position.numpy(), normal.numpy(), base.numpy(), lights.numpy())

    def to_atlas(self, base: np.ndarray, gloss: np.ndarray) -> np.ndarray:
        """``(T, T, 3)`` float32 from colours ``(N, 3)`` and highlights ``(N,)`` of the covered texels.

        A seam of empty texels around the charts repeats its neighbours.
        """
        atlas = np.zeros((self.texture_size**2, 3), np.float32)
        fill_atlas(base, gloss, self._target, self._source, atlas)
        return atlas.reshape(self.texture_size, self.texture_size, 3)


class LitSkin:
    """One frame's skin under the lights; made by :meth:`Appearance.light`."""

    def __init__(
        self, skin: Appearance, position: np.ndarray, normal: np.ndarray, base: np.ndarray, lights: np.ndarray
    ):
        self._skin, self._position, self._normal, self._base = skin, position, normal, base
        shining = zip(lights, (strength for _, _, strength in _LIGHTS), strict=True)
        self._lights = tuple(
            (*(np.float32(axis) for axis in light), np.float32(strength)) for light, strength in shining if strength > 0
        )
        self._gloss, self._facing = (np.empty(len(base), np.float32) for _ in range(2))

    def view(self, centre: np.ndarray) -> np.ndarray:
        """The texture ``(T, T, 3)`` float32 in 0..255 that a camera at ``centre (3,)`` mm, head frame, sees."""
        self._shine(centre)
        return self._skin.to_atlas(self._base, self._gloss)

    def average(self, centres: np.ndarray) -> np.ndarray:
        """``(T, T, 3)`` mean of :meth:`view` over ``centres (K, 3)``, weighted by the squared cosine beyond grazing.

        Occlusion is not considered: texels behind other skin, such as those in a closed mouth, have a colour too.
        """
        total, weight = np.zeros_like(self._base), np.zeros_like(self._gloss)
        for centre in centres:
            self._shine(centre)
            add_view(self._base, self._gloss, self._facing, total, weight)
        return self._skin.to_atlas(total / weight[:, None], np.zeros_like(weight))

    def _shine(self, centre: np.ndarray) -> None:
        eye = tuple(np.float32(axis) for axis in centre)
        parts = (self._position, self._normal, self._skin.patterns.oil.numpy(), self._skin.wet.numpy())
        highlights(*parts, self._lights, eye, self._gloss, self._facing)


class _Patterns:
    """Where oil, blood and wrinkles lie on a face: smooth functions of the neutral position."""

    def __init__(self, face: FaceAsset, position: Tensor, skin: Tensor):
        spots = {name: torch.from_numpy(face.neutral[index]) for name, index in face.topology.landmarks.items()}
        self.unit = 0.5 * (spots["eye_left_outer"] - spots["eye_right_outer"]).norm().item() / 46.0
        self.position, self.spots, self.skin = position, spots, skin
        forehead = self._at("brow_left_inner", "brow_right_inner", offset=(0, 28, 0))
        cheeks = {side: self._at(f"eye_{side}_lower", f"lip_corner_{side}", offset=(0, 6, 0)) for side in _SIDES}
        self.oil = skin * (
            0.035
            + 0.13 * self._blob(self._at("nose_tip"), 13.0)
            + 0.08 * self._blob(self._at("nose_bridge"), 12.0)
            + 0.10 * self._blob(forehead, 34.0)
            + 0.07 * sum(self._blob(cheeks[side], 20.0) for side in _SIDES)
            + 0.07 * self._blob(self._at("chin", offset=(0, 4, 0)), 14.0)
            + 0.10 * self._blob(self._at("lip_lower"), 9.0)
        )
        self.blood = {
            ("cheek", side): self._blob(cheeks[side] + torch.tensor([0.0, -4.0, 0.0]), 23.0) for side in _SIDES
        }
        self.blood["lips", ""] = self._blob(self._at("lip_upper", "lip_lower"), 15.0)
        self.blood["nose", ""] = self._blob(self._at("nose_tip", "nose_bridge"), 16.0)
        self.wrinkles = self._wrinkles(forehead)

    def dress(self, albedo: Tensor, names: tuple[str, ...], weights: np.ndarray) -> Tensor:
        """The albedo ``(N, 3)`` with the expression's blood and wrinkles."""
        flush = sum(
            _cause(_BLOOD_CAUSES[kind], side, names, weights) * pattern for (kind, side), pattern in self.blood.items()
        )
        redness = (0.30 * self.skin * flush).clamp(min=-0.22, max=0.35)[:, None]
        depth = sum(
            _cause(_WRINKLE_CAUSES[kind], side, names, weights) * pattern
            for (kind, side), pattern in self.wrinkles.items()
        )
        shading = 1 - 0.26 * (self.skin * depth).clamp(min=0, max=1)[:, None]
        return albedo * (1 + redness * torch.tensor([0.12, -0.62, -0.55])) * shading

    def _at(self, *names: str, offset: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
        return torch.stack([self.spots[name] for name in names]).mean(0) + self.unit * torch.tensor(offset).float()

    def _blob(self, centre: Tensor, radius: float) -> Tensor:
        return torch.exp(-(self.position - centre).square().sum(-1) / (radius * self.unit) ** 2)

    def _wrinkles(self, forehead: Tensor) -> dict[tuple[str, str], Tensor]:
        x, y = self.position[:, 0], self.position[:, 1]
        centre = self._at("nose_bridge")
        across = (x - centre[0]) / self.unit
        lines = 0.5 + 0.5 * torch.cos((y - forehead[1] + 0.006 * across.square()) / self.unit * 2 * np.pi / 9.0)
        found = {
            ("forehead", ""): lines**4 * self._blob(forehead, 32.0),
            ("glabella", ""): torch.exp(-(((across.abs() - 5.0) / 1.8) ** 2))
            * self._blob(self._at("brow_left_inner", "brow_right_inner"), 14.0),
        }
        for side in _SIDES:
            corner = self._at(f"eye_{side}_outer")
            dx, dy = (x - corner[0]).abs() / self.unit, (y - corner[1]) / self.unit
            fan = 0.5 + 0.5 * torch.cos(torch.atan2(dy, dx) * 11.0)
            outward = torch.sigmoid(((x - corner[0]) * (1 if side == "left" else -1) / self.unit - 2.0) / 1.5)
            found["crow", side] = fan**4 * outward * self._blob(corner, 20.0)
            start, end = self._at(f"nose_wing_{side}", offset=(0, 4, 0)), self._at(f"lip_corner_{side}")
            sign = 1.0 if side == "left" else -1.0
            end = end + self.unit * torch.tensor([6.0 * sign, -4.0, 0.0])
            found["nasolabial", side] = self._crease(start, end, bulge=4.5 * sign)
        return found

    def _crease(self, start: Tensor, end: Tensor, *, bulge: float) -> Tensor:
        """A curved line of about 2 mm between two points, seen from the front."""
        along = ((self.position - start)[:, 1] / (end - start)[1]).clamp(min=-0.3, max=1.3)
        line_x = start[0] + along * (end - start)[0] + bulge * self.unit * torch.sin(np.pi * along.clamp(0, 1))
        line = torch.exp(-(((self.position[:, 0] - line_x) / (2.0 * self.unit)) ** 2))
        ends = torch.sigmoid((along + 0.02) * 25) * torch.sigmoid((1.02 - along) * 25)
        return line * ends * (self.position[:, 2] > 0)


_SIDES = ("left", "right")


def _cause(causes: dict[str, float], side: str, names: tuple[str, ...], weights: np.ndarray) -> float:
    """How strongly an expression brings a pattern out: -1..1."""
    total = 0.0
    for name, strength in causes.items():
        sides = (side.capitalize(),) if side else ("Left", "Right")
        wanted = (name,) if name in names else tuple(name + suffix for suffix in sides)
        present = [weights[names.index(shape)] for shape in wanted if shape in names]
        total += strength * float(np.mean(present)) if present else 0.0
    return float(np.clip(total, -1.0, 1.0))


def _exposure(albedo: Tensor) -> float:
    """One gain for all channels that brings a dark asset's bright skin to a mid grey; never below 1."""
    return max(1.0, 135.0 / float(albedo.mean(-1).quantile(0.85)))


def _nearest_covered(covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Atlas index of every texel to fill, and the row of the covered list it takes: itself, or the texel from which
    a few dilations reach it, so that bilinear look-ups at chart borders never meet the empty atlas."""
    source = np.where(covered.ravel(), np.cumsum(covered.ravel()) - 1, -1).reshape(covered.shape)
    for _ in range(3):
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            shifted = np.roll(source, step, axis=axis)
            np.moveaxis(shifted, axis, 0)[0 if step == 1 else -1] = -1
            source = np.where(source < 0, shifted, source)
    target = np.flatnonzero(source.ravel() >= 0)
    return target, source.ravel()[target]
