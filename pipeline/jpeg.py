"""JPEG straight into colour planes, by libjpeg-turbo (simplejpeg); the pixels are Pillow's, bit for bit.

Pillow unpacks every row to four bytes a pixel. Without that, a photo takes 14 ms in place of 17, and the copy to
planes is cheaper. The GIL is given back throughout. What libjpeg only warns of (a file that ends early, bytes that
belong to nothing) is an error.
"""

from __future__ import annotations

import threading

import numba
import numpy as np
import simplejpeg

_COLOUR_SPACES = frozenset({"YCbCr", "Gray", "RGB"})


class JpegFormatError(ValueError):
    """Bytes that are no whole JPEG file of 8-bit colour or grey."""


class _Scratch(threading.local):
    """Memory for one image a thread: fresh pages for each would cost more than the copy to planes."""

    def __init__(self) -> None:
        self.pixels = np.empty(0, np.uint8)

    def take(self, height: int, width: int) -> np.ndarray:
        size = height * width * 3
        if len(self.pixels) < size:
            self.pixels = np.empty(size, np.uint8)
        return self.pixels[:size].reshape(height, width, 3)


_scratch = _Scratch()


def jpeg_size_hw(body: bytes | memoryview) -> tuple[int, int]:
    """(height, width) from the header.

    Raises:
        JpegFormatError: no JPEG, or neither colour nor grey.
    """
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(body)
    except ValueError as error:
        raise JpegFormatError(str(error)) from error
    if colour_space not in _COLOUR_SPACES:
        raise JpegFormatError(f"pixel format {colour_space}, expected 8-bit RGB or grey")
    return height, width


def decode_jpeg(body: bytes | memoryview, pixels: np.ndarray) -> None:
    """Decode into ``pixels (H, W, 3)`` uint8, C-contiguous and of the file's size; on an error undefined.

    Raises:
        JpegFormatError: damage of any kind.
        ValueError: a target of another size.
    """
    if jpeg_size_hw(body) != pixels.shape[:2]:
        raise ValueError(f"target: {pixels.shape}, expected {(*jpeg_size_hw(body), 3)}")
    try:
        simplejpeg.decode_jpeg(body, "RGB", buffer=pixels)
    except ValueError as error:
        raise JpegFormatError(str(error)) from error


def decode_jpeg_planes(body: bytes | memoryview, target: np.ndarray, *, bottom_up: bool = False) -> None:
    """Decode into ``target (3, H, W)`` uint8, C-contiguous and of the file's size; on an error undefined.

    Args:
        body: the file.
        target: the planes.
        bottom_up: whether row 0 of ``target`` is the bottom of the file.

    Raises:
        JpegFormatError: damage of any kind.
        ValueError: a target of another size.
    """
    pixels = _scratch.take(*target.shape[1:])
    decode_jpeg(body, pixels)
    _split_interleaved(pixels.reshape(len(pixels), -1), target, bottom_up)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _split_interleaved(pixels: np.ndarray, target: np.ndarray, bottom_up: bool) -> None:
    """``pixels (H, 3 W)`` to ``target (3, H, W)``; with rows as flat arrays the loop is vectorised."""
    _, height, width = target.shape
    for y in range(height):
        row, out = pixels[y], height - 1 - y if bottom_up else y
        red, green, blue = target[0, out], target[1, out], target[2, out]
        for x in range(width):
            red[x] = row[3 * x]
            green[x] = row[3 * x + 1]
            blue[x] = row[3 * x + 2]
