"""Contact sheets: photo, reconstruction and error side by side, labelled, ready to be logged or put into a report.

Images are ``(H, W, 3)`` uint8 RGB. Sizes are free: a sheet scales every image to one tile height.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ERROR_FULL_SCALE = 64.0
"""The error, in 0..255 colour levels, that the heat map shows as its brightest colour."""

COMPARISON_LABELS = ("photo", "reconstruction", f"error, 0 to {ERROR_FULL_SCALE:.0f} levels")

_PAPER, _INK, _MUTED = (255, 255, 255), (24, 28, 36), (96, 104, 118)
_FACE_SHARE = 0.25
_GAP_PX = 8
_COLOUR_BAR_PX = 10


def expose(image: np.ndarray, exposure: float = 1.0, gamma: float = 1.0) -> np.ndarray:
    """``image`` brightened for display: ``255 (exposure x / 255) ** (1 / gamma)``, clipped."""
    if exposure == 1.0 and gamma == 1.0:
        return image
    levels = np.clip(exposure * np.arange(256) / 255.0, 0.0, 1.0) ** (1.0 / gamma)
    return np.round(255.0 * levels).astype(np.uint8)[image]


def suggested_exposure(images: Sequence[np.ndarray], target: float = 230.0, most: float = 4.0) -> float:
    """The exposure that brings the 99th percentile of what is not black to ``target``; 1 to ``most``."""
    lit = np.concatenate([image.max(-1)[image.max(-1) > 0] for image in images])
    if lit.size == 0:
        return 1.0
    return float(np.clip(target / np.percentile(lit, 99), 1.0, most))


def absolute_error(photo: np.ndarray, reconstruction: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """``(H, W)`` float: the mean over channels of the absolute difference, 0..255; 0 where ``mask (H, W)`` is 0."""
    if photo.shape != reconstruction.shape:
        raise ValueError(f"photo {photo.shape} and reconstruction {reconstruction.shape} differ in size")
    error = np.abs(photo.astype(np.float32) - reconstruction.astype(np.float32)).mean(-1)
    return error if mask is None else np.where(mask > 0, error, 0.0)


def heat_map(error: np.ndarray, full_scale: float = ERROR_FULL_SCALE) -> np.ndarray:
    """``(H, W, 3)`` uint8: black at 0, through red and orange to pale yellow at ``full_scale`` and above."""
    from matplotlib import colormaps

    return colormaps["inferno"](np.clip(error / full_scale, 0.0, 1.0), bytes=True)[..., :3]


def heat_over_face(values: np.ndarray, face: np.ndarray, mask: np.ndarray, full_scale: float) -> np.ndarray:
    """``(H, W, 3)`` uint8: a heat map with the face's own light and dark faintly in it, on white.

    Args:
        values: ``(H, W)``, not negative.
        face: ``(H, W, 3)`` uint8, for orientation.
        mask: ``(H, W)`` bool, where there is face.
        full_scale: shown as the brightest colour.
    """
    if values.shape != mask.shape or face.shape != (*mask.shape, 3):
        raise ValueError(f"values {values.shape}, face {face.shape} and mask {mask.shape} differ in size")
    grey = face.astype(np.float32).mean(-1, keepdims=True)
    mixed = (1 - _FACE_SHARE) * heat_map(values, full_scale) + _FACE_SHARE * grey
    return np.where(mask[..., None], np.round(mixed), 255).astype(np.uint8)


def comparison_row(
    photo: np.ndarray,
    reconstruction: np.ndarray,
    error: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    exposure: float = 1.0,
    gamma: float = 1.0,
    full_scale: float = ERROR_FULL_SCALE,
) -> list[np.ndarray]:
    """The tiles ``[photo, reconstruction, heat map]`` of one view.

    Args:
        photo: ``(H, W, 3)`` uint8.
        reconstruction: ``(H, W, 3)`` uint8.
        error: ``(H, W)`` in 0..255; None: :func:`absolute_error` of the two, before any exposure.
        mask: ``(H, W)``, where the two are compared; used only if ``error`` is None.
        exposure: of photo and reconstruction, for display only.
        gamma: likewise.
        full_scale: error shown as the brightest colour; label the column with it.
    """
    if error is None:
        error = absolute_error(photo, reconstruction, mask)
    shown = [expose(image, exposure, gamma) for image in (photo, reconstruction)]
    return [*shown, heat_map(error, full_scale)]


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    column_labels: Sequence[str] = COMPARISON_LABELS,
    row_labels: Sequence[str] = (),
    title: str = "",
    tile_height_px: int = 224,
    colour_bar: bool = True,
) -> np.ndarray:
    """One labelled sheet ``(H, W, 3)`` uint8 of rows of tiles.

    Args:
        rows: of images; rows may differ in length, and images in size.
        column_labels: above the columns.
        row_labels: left of the rows, e.g. the driving signal; a line break starts a new line.
        title: above everything.
        tile_height_px: to which every image is scaled.
        colour_bar: draw the heat map's colours, 0 to full scale, under the last column.

    Raises:
        ValueError: no rows, or as many labels as do not fit.
    """
    if not rows or not all(rows):
        raise ValueError("a sheet needs at least one row of at least one image")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} row labels for {len(rows)} rows")
    tiles = [[_scaled(image, tile_height_px) for image in row] for row in rows]
    columns = max(len(row) for row in tiles)
    widths = [max(row[column].width for row in tiles if column < len(row)) for column in range(columns)]
    size = int(np.clip(tile_height_px / 15, 11, 28))
    font, bold = ImageFont.load_default(size), ImageFont.load_default(round(size * 1.35))
    margin = 2 * _GAP_PX
    text_width = max((_text_width(font, line) for label in row_labels for line in label.split("\n")), default=0)
    left = margin + (text_width + margin if row_labels else 0)
    title_height = round(size * 2.4) if title else 0
    top = margin + title_height + (round(size * 1.8) if column_labels else 0)
    bar_height = _COLOUR_BAR_PX + _GAP_PX if colour_bar else 0
    width = left + sum(widths) + _GAP_PX * (columns - 1) + margin
    height = top + len(tiles) * (tile_height_px + _GAP_PX) + bar_height + margin - _GAP_PX

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), title, fill=_INK, font=bold)
    starts = [left + sum(widths[:column]) + _GAP_PX * column for column in range(columns)]
    for column, label in enumerate(column_labels[:columns]):
        label = _fitting(font, label, widths[column])
        draw.text((starts[column] + widths[column] / 2, top - _GAP_PX / 2), label, _MUTED, font, anchor="md")
    for index, row in enumerate(tiles):
        y = top + index * (tile_height_px + _GAP_PX)
        if row_labels:
            middle = (margin, y + tile_height_px / 2)
            draw.multiline_text(middle, row_labels[index], _INK, font, anchor="lm", spacing=size // 3)
        for column, tile in enumerate(row):
            sheet.paste(tile, (starts[column] + (widths[column] - tile.width) // 2, y))
    if colour_bar:
        ramp = heat_map(np.linspace(0, 1, widths[-1])[None].repeat(_COLOUR_BAR_PX, 0), full_scale=1.0)
        sheet.paste(Image.fromarray(ramp), (starts[-1], height - margin - _COLOUR_BAR_PX))
    return np.asarray(sheet)


def _scaled(image: np.ndarray, height_px: int) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image must be (H, W, 3) uint8, found {image.shape} {image.dtype}")
    width_px = max(1, round(image.shape[1] * height_px / image.shape[0]))
    method = Image.Resampling.LANCZOS if image.shape[0] > height_px else Image.Resampling.BICUBIC
    return Image.fromarray(np.ascontiguousarray(image)).resize((width_px, height_px), method)


def _text_width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


def _fitting(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width_px: int) -> str:
    """``text``, shortened if it is wider than its column."""
    if _text_width(font, text) <= width_px:
        return text
    while text and _text_width(font, f"{text}…") > width_px:
        text = text[:-1]
    return f"{text}…"
