"""Pillow's own memory of a colour image, four bytes a pixel, to planes or to three bytes a pixel, without the GIL."""

from __future__ import annotations

import numba
import numpy as np
import pyarrow
from PIL import Image

_8, _16 = np.uint32(8), np.uint32(16)


def packed_pixels(image: Image.Image) -> np.ndarray:
    """``(H, W)`` uint32 of an RGB image, red in the lowest byte: Pillow's own memory where it can be had."""
    try:
        packed = pyarrow.array(image).flatten().to_numpy(zero_copy_only=True)
    except ValueError:  # a large image, which Pillow keeps in several pieces
        packed = np.asarray(image.convert("RGBA"))
    return packed.reshape(-1).view("<u4").reshape(image.height, image.width)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def split_planes(pixels: np.ndarray, target: np.ndarray, bottom_up: bool) -> None:
    """``pixels (H, W)``, as :func:`packed_pixels`, to ``target (3, H, W)``."""
    height, width = pixels.shape
    for y in range(height):
        row, out = pixels[y], height - 1 - y if bottom_up else y
        red, green, blue = target[0, out], target[1, out], target[2, out]
        # three plain loops: each of them is vectorised
        for x in range(width):
            red[x] = row[x]
        for x in range(width):
            green[x] = row[x] >> _8
        for x in range(width):
            blue[x] = row[x] >> _16


@numba.njit(nogil=True, cache=True, error_model="numpy")
def drop_fourth(pixels: np.ndarray, target: np.ndarray) -> None:
    """``pixels (H, 4 W)`` to ``target (H, 3 W)``; with rows as flat arrays the loop is vectorised."""
    height, width = len(pixels), pixels.shape[1] // 4
    for y in range(height):
        row, out = pixels[y], target[y]
        for x in range(width):
            out[3 * x] = row[4 * x]
            out[3 * x + 1] = row[4 * x + 1]
            out[3 * x + 2] = row[4 * x + 2]
