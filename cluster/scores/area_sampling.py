"""Images for comparison with photos: several renderer samples a pixel, averaged.

A camera's pixel collects light over its whole area, and the renderer samples a point. Compared with photos, point
samples of the very mesh and texture that were photographed are wrong by their aliasing alone, and that error is the
same for every method: it hides what differs between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from lipflow.render.renderer import Renderer
from lipflow.types import CameraTensors, map_tensors

SAMPLES = 2
"""Along each axis of a pixel, wherever images are scored."""

_SAMPLES_AT_A_TIME = 2**23
"""Memory: views are rendered one after another beyond."""


@dataclass
class AreaSampled:
    """One frame's K views at the cameras' size.

    Attributes:
        image: ``(K, C, H, W)`` mean over a pixel's samples, 0 for those that miss the mesh.
        coverage: ``(K, H, W)`` share of the samples that show the mesh.
        triangle_id: ``(K, H, W)`` int64 the triangle at one sample beside the centre, and -1 in every pixel that the
            mesh does not cover whole.
    """

    image: Tensor
    coverage: Tensor
    triangle_id: Tensor


def render_area(
    renderer: Renderer,
    vertices: Tensor,
    textures: Tensor,
    cameras: CameraTensors,
    image_size_hw: tuple[int, int],
    samples: int = SAMPLES,
) -> AreaSampled:
    """Render one frame with ``samples x samples`` samples a pixel.

    Args:
        renderer: of the topology; silhouettes are not blended.
        vertices: ``(1, V, 3)`` mm.
        textures: ``(1, K or 1, C, T, T)``.
        cameras: ``(1, K)`` cameras.
        image_size_hw: (height, width) in pixels, to which K refers.
        samples: along each axis of a pixel.
    """
    height, width = image_size_hw
    size = height * samples, width * samples
    zoom = vertices.new_tensor([samples, samples, 1.0])[:, None]
    fine = replace(cameras, intrinsics=cameras.intrinsics * zoom)
    views = cameras.intrinsics.shape[1]
    textures = textures.expand(-1, views, -1, -1, -1)
    step = max(1, _SAMPLES_AT_A_TIME // (size[0] * size[1]))
    images, coverages, triangles = [], [], []
    for first in range(0, views, step):
        chosen = slice(first, first + step)
        some = map_tensors(fine, lambda tensor, chosen=chosen: tensor[:, chosen])
        drawn = renderer.render(vertices, textures[:, chosen], some, size, antialias=False)
        seen = drawn.mask[0].to(drawn.image.dtype)
        images.append(avg_pool2d(drawn.image[0], samples))
        coverages.append(avg_pool2d(seen, samples))
        whole = max_pool2d(1 - seen, samples) == 0
        near_centre = drawn.triangle_id[0, :, samples // 2 :: samples, samples // 2 :: samples].long()
        triangles.append(torch.where(whole, near_centre, -1))
    return AreaSampled(torch.cat(images), torch.cat(coverages), torch.cat(triangles))
