"""Pictures of a training: validation frames beside what the avatar makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster.reports.pictures import comparison_row, contact_sheet
from lipflow.model.avatar import Avatar
from lipflow.render.outline import over_photo
from lipflow.render.renderer import Renderer
from lipflow.types import FrameBatch

PICTURED_FRAMES = 4


@torch.no_grad()
def comparison_sheet(avatar: Avatar, renderer: Renderer, batches: Sequence[FrameBatch], title: str) -> np.ndarray:
    """Photo, reconstruction from the posterior mean and error, ``(H, W, 3)`` uint8: the first view of each frame.

    Args:
        avatar: on the batches' device.
        renderer: of its topology.
        batches: of one frame each; the first few are shown.
        title: of the sheet.
    """
    rows, labels = [], []
    for batch in batches[:PICTURED_FRAMES]:
        z = avatar.encode(batch.vertices, batch.average_texture).mean
        decoded = avatar.decode(z, batch.cameras.view_vectors())
        textures = avatar.correct_color(decoded.textures, batch.camera_index)
        height, width = batch.images.shape[-2:]
        rendered = renderer.render(decoded.vertices, textures, batch.cameras, (height, width))
        image = over_photo(rendered, batch.images) if renderer.antialias else rendered.image
        photo, shown = (
            picture[0, 0].permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).cpu().numpy()
            for picture in (batch.images.float(), image)
        )
        mask = (rendered.weight[0, 0] > 0).cpu().numpy()
        rows.append(comparison_row(photo, shown, mask=mask))
        labels.append(batch.frame_ids[0])
    return contact_sheet(rows, row_labels=labels, title=title)
