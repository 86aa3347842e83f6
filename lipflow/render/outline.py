"""What an antialiased rendering is compared with: its silhouettes over the photo's own background.

The renderer blends silhouettes over black. A photo shows there what lies behind the face, and where that is not black
a loss would draw the outline, and the texture beside it, to wherever the difference is least. Training and fitting
compare the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipflow.render.renderer import RenderOutput

_NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""(row, column) steps to the pixels that antialiasing blends a pixel with."""


def over_photo(rendered: RenderOutput, photos: Tensor) -> Tensor:
    """The rendered image where the mesh is seen, its blended outline over the photo's pixels just outside of it.

    Args:
        rendered: of B frames with K views, antialiased.
        photos: ``(B, K, C, H, W)`` of any type, without gradient.

    Returns:
        ``(B, K, C, H, W)``; outside of the mesh's mask, the rendered image as it is.

    Raises:
        ValueError: the photos have another shape than the image.
    """
    if photos.shape != rendered.image.shape:
        raise ValueError(f"photos {tuple(photos.shape)} and image {tuple(rendered.image.shape)} differ in shape")
    mask, coverage = rendered.mask.flatten(0, 1), rendered.coverage.flatten(0, 1)
    height, width = mask.shape[1:]
    view, row, column = (mask & (coverage < 1)).nonzero(as_tuple=True)
    pixels = photos.flatten(0, 1).movedim(1, -1)
    total, count = coverage.new_zeros(len(view), photos.shape[2]), coverage.new_zeros(len(view), 1)
    for down, right in _NEIGHBOURS:
        place = view, (row + down).clamp(0, height - 1), (column + right).clamp(0, width - 1)
        outside = ~mask[place][:, None]
        total += torch.where(outside, pixels[place].to(total.dtype), 0.0)
        count += outside
    background = total / count.clamp(min=1)
    shown = background * (1 - coverage[view, row, column])[:, None]
    image = rendered.image.flatten(0, 1).movedim(1, -1)
    image = image.index_put((view, row, column), shown, accumulate=True)
    return image.movedim(-1, 1).unflatten(0, rendered.mask.shape[:2])
