"""Images of distorted cameras as their pinhole cameras would have taken them.

The renderer and the losses know pinhole cameras only, so a lens is taken out once, where images enter the pipeline.
The pinhole camera keeps K and the image size: the middle of the image stays where it is and as sharp as it is, and
what the lens had squeezed in at the rim leaves the picture.

No map is stored: the place that a pixel is read from costs less to compute than to fetch, and maps of 160 full-size
cameras would take 3.5 GB in every worker.
"""

from __future__ import annotations

from dataclasses import replace

import numba
import numpy as np
import torch

from lipflow.errors import CaptureError
from lipflow.render.lens import undistort, valid_radius
from lipflow.types import Camera
from pipeline.capture_errors import check_image_size

MAX_FOLDED_FRACTION = 0.1
"""A lens model may turn back in the corners of an image, where it was never fitted; one that turns back over a larger
share of it was misread, or belongs to another image size."""


class Undistorter:
    """Takes the lens of one camera out of its images and image points.

    Args:
        camera: with its distortion.

    Attributes:
        camera: the pinhole camera of the images that come out: the same K and size, no distortion.

    Raises:
        CaptureError: the lens model folds over more than ``MAX_FOLDED_FRACTION`` of the image.
    """

    def __init__(self, camera: Camera):
        self._lens = np.asarray(camera.distortion, np.float64)
        self._source = camera
        self._radius = valid_radius(self._lens)
        self.camera = replace(camera, distortion=np.zeros(5)) if self._lens.any() else camera
        folded = self._folded_fraction()
        if folded > MAX_FOLDED_FRACTION:
            raise CaptureError(
                f"camera {camera.camera_id}: its distortion {self._lens.tolist()} (k1 k2 p1 p2 k3) turns back at "
                f"{self._radius:.3g} of the focal length, inside {folded:.0%} of the image; expected at most "
                f"{MAX_FOLDED_FRACTION:.0%}: correct the coefficients and their order, or leave the camera out"
            )

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Resample an image bilinearly.

        Args:
            image: ``(H, W, 3)`` or ``(H, W)`` uint8 of the distorted camera.

        Returns:
            The pinhole camera's image, of the same shape; black where the lens model or the source image ends.
            Without distortion: the image itself.

        Raises:
            ImageSizeError: another size than the camera's.
        """
        check_image_size(image.shape[:2], self._source, f"image of camera {self._source.camera_id}")
        if self.camera is self._source:
            return image
        channels = np.ascontiguousarray(image).reshape(*image.shape[:2], -1)
        pinhole = np.zeros_like(channels)
        _resample(channels, np.asarray(self._source.intrinsics, np.float64), self._lens, self._radius**2, pinhole)
        return pinhole.reshape(image.shape)

    def coverage(self) -> np.ndarray | None:
        """``(H, W)`` bool, False where :meth:`apply` leaves black; None without distortion, where nothing is lost."""
        if self.camera is self._source:
            return None
        return self.apply(np.full(self._source.image_size_hw, 255, np.uint8)) > 0

    def apply_to_points(self, points_px: np.ndarray) -> np.ndarray:
        """Where image points lie in the pinhole camera's image.

        Args:
            points_px: ``(N, 2)`` x, y in the distorted image.

        Returns:
            ``(N, 2)`` float64; NaN where the lens model images nothing.
        """
        if self.camera is self._source:
            return np.asarray(points_px, np.float64)
        intrinsics = np.asarray(self._source.intrinsics, np.float64)
        homogeneous = np.concatenate([points_px, np.ones((len(points_px), 1))], axis=1)
        normalised = np.linalg.solve(intrinsics, homogeneous.T).T[:, :2]
        straight = undistort(torch.from_numpy(np.ascontiguousarray(normalised)), torch.from_numpy(self._lens)).numpy()
        return straight @ intrinsics[:2, :2].T + intrinsics[:2, 2]

    def _folded_fraction(self) -> float:
        """Share of the pinhole image's pixels that lie beyond the valid radius."""
        if np.isinf(self._radius):
            return 0.0
        height, width = self._source.image_size_hw
        rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
        (fx, skew, cx), (_, fy, cy) = self._source.intrinsics[:2]
        ray_y = (rows - cy) / fy
        ray_x = (columns - cx - skew * ray_y) / fx
        return float((ray_x**2 + ray_y**2 > self._radius**2).mean())


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _resample(source, intrinsics, lens, squared_radius, target):
    """Fill ``target (H, W, C)`` from ``source (H, W, C)``; the formula is that of :func:`lipflow.render.lens.distort`.

    Pixels without a source are left as they are. Strict arithmetic, no fused or reordered operations: the bytes are the
    same on every machine, and shards stay comparable.
    """
    height, width, channels = source.shape
    fx, skew, cx = intrinsics[0, 0], intrinsics[0, 1], intrinsics[0, 2]
    fy, cy = intrinsics[1, 1], intrinsics[1, 2]
    k1, k2, p1, p2, k3 = lens[0], lens[1], lens[2], lens[3], lens[4]
    for row in range(height):
        y = (row + 0.5 - cy) / fy
        for column in range(width):
            x = (column + 0.5 - cx - skew * y) / fx
            squared = x * x + y * y
            if squared > squared_radius:
                continue
            radial = 1.0 + squared * (k1 + squared * (k2 + squared * k3))
            bent_x = x * radial + p1 * 2.0 * x * y + p2 * (squared + 2.0 * x * x)
            bent_y = y * radial + p1 * (squared + 2.0 * y * y) + p2 * 2.0 * x * y
            across = fx * bent_x + skew * bent_y + cx
            down = fy * bent_y + cy
            if not (0.0 <= across <= width and 0.0 <= down <= height):
                continue
            across = min(max(across - 0.5, 0.0), width - 1.0)
            down = min(max(down - 0.5, 0.0), height - 1.0)
            left, top = int(across), int(down)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            across, down = across - left, down - top
            for channel in range(channels):
                upper = source[top, left, channel] * (1.0 - across) + source[top, right, channel] * across
                lower = source[bottom, left, channel] * (1.0 - across) + source[bottom, right, channel] * across
                target[row, column, channel] = np.uint8(upper * (1.0 - down) + lower * down + 0.5)
