"""Values that live on vertices, seen through the pixels of a rendering: heat maps over a face.

A pixel's place in its triangle follows from its texture coordinates, which are an affine map of the triangle:
perspective is in them already, and no second rasterisation is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipflow.render.renderer import Renderer, RenderOutput

_LEAST_AREA = 1e-12
"""Of a triangle in texture space (twice its area); smaller ones have no inverse."""


def vertex_values_seen(renderer: Renderer, rendered: RenderOutput, values: Tensor) -> Tensor:
    """Values of the vertices at every pixel, linear in between: ``(B, K, H, W)``, 0 where nothing is seen.

    In triangles that have no area in texture space it is the mean of the corners.

    Args:
        renderer: that rendered.
        rendered: B frames with K views.
        values: ``(B, V)`` of the frames' vertices.
    """
    seen = rendered.triangle_id >= 0
    frame = seen.nonzero()[:, 0]
    triangle = rendered.triangle_id[seen].long()
    corners = renderer.face_uvs[triangle].double()
    across, down = (corners[:, 1:] - corners[:, :1]).unbind(1)
    offset = rendered.uv[seen].double() - corners[:, 0]
    area = _cross(across, down)
    flat = area.abs() < _LEAST_AREA
    area = area.masked_fill(flat, 1.0)
    second, third = _cross(offset, down) / area, _cross(across, offset) / area
    shares = torch.stack([1 - second - third, second, third], dim=-1)
    shares = torch.where(flat[:, None], 1 / 3, shares)
    of_corners = values[frame[:, None], renderer.faces[triangle]].double()
    image = torch.zeros(rendered.triangle_id.shape, dtype=torch.float64, device=values.device)
    image[seen] = (shares * of_corners).sum(-1)
    return image.to(values.dtype)


def _cross(first: Tensor, second: Tensor) -> Tensor:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
