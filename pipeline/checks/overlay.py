"""The tracked mesh drawn over a capture's photos: what shows at a glance whether calibration, pose and mesh agree.

The mesh goes through the reader's own cameras, poses and lens distortion, in float64. Where the wireframe lies on the
eyes, lips and outline of the face, every convention between the files and the renderer's pixels is right.

Hidden lines are removed a pixel at a time: a pixel shows the edges of the triangle that is seen in it (Baerentzen et
al., "Single-pass Wireframe Rendering", SIGGRAPH 2006 sketches), on a finer grid that is averaged afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from lipflow.errors import CaptureError
from lipflow.render.camera import compose
from lipflow.render.cpu import NEAR_MM, rasterize_view
from lipflow.render.lens import distort, valid_radius
from lipflow.types import Camera
from pipeline.capture import Capture, CaptureFrame
from pipeline.capture_errors import check_image_size, fault_name
from pipeline.images.codecs import CodecError, decode_any_image

__all__ = ["ProjectedMesh", "contact_sheet", "coverage", "draw_overlay", "first_tracked_frame", "project_mesh"]

SUPERSAMPLING = 2
"""Samples of the finer grid along each axis of a pixel."""

THUMB_HEIGHT_PX = 240

_Colour = tuple[int, int, int]
_WIRE, _OUTLINE = (64, 224, 255), (255, 144, 32)
_PAPER, _INK, _MUTED = (24, 26, 30), (236, 238, 242), (150, 156, 166)
_MISSING = "missing"
_MISSING_TILE, _BROKEN_TILE = (44, 47, 54), (92, 34, 34)
_WIRE_OPACITY = 0.6
_WIRE_WIDTH_PX, _OUTLINE_WIDTH_PX = 1.0, 3.0
_LEAST_EDGE_PX = 1024
"""Photos with a smaller long edge are magnified by a whole number, or the wires would cover them."""

_DARK_LEVEL, _LEAST_GAMMA = 104.0, 0.4
_SHEET_ASPECT = 1.6
_GAP_PX = 6


@dataclass(frozen=True)
class ProjectedMesh:
    """A mesh as one camera images it, lens included.

    Attributes:
        corners: ``(V, 3)`` float64 mm; ``(x / z, y / z)`` is the point of the *distorted* image plane, z the depth.
        faces: ``(F, 3)`` int64, the triangles that lie wholly before the camera and within its lens model.
        camera: K and size are the image's.
    """

    corners: np.ndarray
    faces: np.ndarray
    camera: Camera

    def pixels(self) -> np.ndarray:
        """``(V, 2)`` float64 x, y; meaningless for a vertex at or behind the camera plane."""
        homogeneous = self.corners @ self.camera.intrinsics.T
        return homogeneous[:, :2] / homogeneous[:, 2:]


def project_mesh(vertices: np.ndarray, faces: np.ndarray, camera: Camera, world_from_head: np.ndarray) -> ProjectedMesh:
    """Where a camera sees a mesh.

    Args:
        vertices: ``(V, 3)`` mm, head frame.
        faces: ``(F, 3)`` vertex indices.
        camera: of the capture.
        world_from_head: ``(3, 4)`` mm.
    """
    cam_from_head = compose(camera.cam_from_world, np.asarray(world_from_head, np.float64))
    corners = np.asarray(vertices, np.float64) @ cam_from_head[:, :3].T + cam_from_head[:, 3]
    usable = corners[:, 2] >= NEAR_MM
    if np.any(camera.distortion):
        depth = np.where(usable, corners[:, 2], 1.0)
        points = corners[:, :2] / depth[:, None]
        usable &= np.linalg.norm(points, axis=1) <= valid_radius(camera.distortion)
        coefficients = torch.from_numpy(np.asarray(camera.distortion, np.float64))
        imaged = distort(torch.from_numpy(points), coefficients).numpy()
        corners = np.concatenate([imaged * depth[:, None], corners[:, 2:]], axis=1)
    return ProjectedMesh(np.ascontiguousarray(corners), np.ascontiguousarray(faces[usable[faces].all(axis=1)]), camera)


def coverage(mesh: ProjectedMesh, size_hw: tuple[int, int], supersampling: int = SUPERSAMPLING) -> np.ndarray:
    """``(H, W)`` float32 in 0..1: the share of each pixel that the mesh covers, in an image scaled to ``size_hw``."""
    return _averaged((_seen(mesh, size_hw, supersampling)[0] >= 0).astype(np.float32), supersampling)


def draw_overlay(capture: Capture, segment: str, frame: str, camera_id: str) -> np.ndarray:
    """The wireframe of a frame's mesh, and its outline, over one camera's photo.

    A photo whose face is dark is brightened by ``255 (c / 255) ** gamma``; the caption states the gamma.

    Returns:
        ``(S H, S W, 3)`` uint8; S is 1 for a photo with an edge of 1024 pixels, and the whole number that makes a
        smaller one about so large.

    Raises:
        CaptureError: no such frame or camera, the view is missing, its size is not the calibrated one, or the frame
            has no usable mesh or pose.
        CodecError: the image cannot be decoded.
    """
    camera = _camera(capture, camera_id)
    shown = capture.frame(segment, frame)
    body = shown.image_file(camera_id)
    source = shown.source_of("image", camera_id)
    if body is None:
        raise CaptureError(
            f"{source}: camera {camera_id} has no image of frame {segment}/{frame}; choose another camera or frame "
            "(--sheet shows which are there)"
        )
    photo = decode_any_image(body, source)
    check_image_size(photo.shape[:2], camera, source)
    mesh = project_mesh(shown.vertices(), capture.topology.faces, camera, shown.world_from_head())
    scale = max(1, round(_LEAST_EDGE_PX / max(photo.shape[:2])))
    size_hw = (photo.shape[0] * scale, photo.shape[1] * scale)
    gamma = _display_gamma(photo[coverage(mesh, photo.shape[:2], 1) > 0])
    picture = _brightened(photo.repeat(scale, axis=0).repeat(scale, axis=1), gamma)
    triangle_id, pixels = _seen(mesh, size_hw, SUPERSAMPLING)
    wires = np.zeros(triangle_id.shape, np.float32)
    _draw_wires(triangle_id, pixels, mesh.faces, SUPERSAMPLING * _WIRE_WIDTH_PX / 2, wires)
    picture = _painted(picture, _averaged(wires, SUPERSAMPLING) * _WIRE_OPACITY, _WIRE)
    picture = _painted(picture, _outline(triangle_id >= 0, SUPERSAMPLING, _OUTLINE_WIDTH_PX), _OUTLINE)
    caption = f"{segment}/{frame}   camera {camera_id}" + ("" if gamma == 1 else f"   display gamma {gamma:.2f}")
    return _captioned(picture, caption)


def contact_sheet(capture: Capture, segment: str, frame: str, thumb_height: int = THUMB_HEIGHT_PX) -> np.ndarray:
    """Thumbnails of one frame from all cameras, each with its id and the outline of the mesh.

    A missing view is an empty tile that says so, and a view that cannot be used is one with the fault's name. One
    photo is decoded at a time. All thumbnails are brightened alike; the sheet's title states the gamma.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        CaptureError: no such frame, or it has no usable mesh or pose.
    """
    shown = capture.frame(segment, frame)
    vertices, world_from_head = shown.vertices(), shown.world_from_head()
    thumbs: list[str | tuple[np.ndarray, np.ndarray]] = []
    levels: list[np.ndarray] = []
    for camera in capture.cameras:
        height, width = camera.image_size_hw
        size_hw = (thumb_height, max(1, round(width * thumb_height / height)))
        try:
            thumb = _thumbnail(shown, camera, size_hw)
        except (CaptureError, CodecError) as error:
            thumbs.append(fault_name(error))
            continue
        if thumb is None:
            thumbs.append(_MISSING)
            continue
        mesh = project_mesh(vertices, capture.topology.faces, camera, world_from_head)
        inside = _seen(mesh, size_hw, 2 * SUPERSAMPLING)[0] >= 0
        thumbs.append((thumb, _outline(inside, 2 * SUPERSAMPLING, _OUTLINE_WIDTH_PX / 2)))
        levels.append(thumb[_averaged(inside.astype(np.float32), 2 * SUPERSAMPLING) > 0])
    gamma = _display_gamma(np.concatenate(levels) if levels else np.empty((0, 3), np.uint8))
    tiles = [
        thumb if isinstance(thumb, str) else _painted(_brightened(thumb[0], gamma), thumb[1], _OUTLINE)
        for thumb in thumbs
    ]
    empty = [tile for tile in tiles if isinstance(tile, str)]
    missing, unusable = empty.count(_MISSING), len(empty) - empty.count(_MISSING)
    title = f"{segment}/{frame}   {len(tiles)} cameras, {missing} missing"
    title += f", {unusable} unusable" if unusable else ""
    title += "" if gamma == 1 else f"   display gamma {gamma:.2f}"
    return _laid_out(title, [camera.camera_id for camera in capture.cameras], tiles, thumb_height)


def first_tracked_frame(capture: Capture) -> tuple[str, str]:
    """(segment, frame) of the first listed frame that has a mesh and a head pose.

    Raises:
        CaptureError: there is none.
    """
    for segment, frames in capture.segments.items():
        listing = capture.listing(segment)
        for frame in frames:
            if frame in listing.vertices and frame in listing.poses:
                return segment, frame
    raise CaptureError(f"{capture.uri}: no listed frame has a tracked mesh and a head pose; there is nothing to draw")


def _camera(capture: Capture, camera_id: str) -> Camera:
    for camera in capture.cameras:
        if camera.camera_id == camera_id:
            return camera
    known = [camera.camera_id for camera in capture.cameras]
    some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    raise CaptureError(f"{capture.uri}: camera {camera_id} is not calibrated; choose one of the {len(known)}: {some}")


def _thumbnail(shown: CaptureFrame, camera: Camera, size_hw: tuple[int, int]) -> np.ndarray | None:
    body = shown.image_file(camera.camera_id)
    if body is None:
        return None
    source = shown.source_of("image", camera.camera_id)
    photo = decode_any_image(body, source)
    check_image_size(photo.shape[:2], camera, source)
    thumb = Image.fromarray(photo).resize(size_hw[::-1], Image.Resampling.LANCZOS, reducing_gap=3)
    return np.asarray(thumb)


def _seen(mesh: ProjectedMesh, size_hw: tuple[int, int], supersampling: int) -> tuple[np.ndarray, np.ndarray]:
    """Triangle ids ``(S H, S W)``, -1 outside, and the mesh's points ``(V, 2)`` in pixels of that grid."""
    fine_hw = (size_hw[0] * supersampling, size_hw[1] * supersampling)
    camera = mesh.camera.resized(fine_hw)
    triangle_id, nearness = np.empty(fine_hw, np.int32), np.empty(fine_hw, np.float64)
    rasterize_view(mesh.corners, mesh.faces, camera.intrinsics, triangle_id, nearness, NEAR_MM)
    return triangle_id, ProjectedMesh(mesh.corners, mesh.faces, camera).pixels()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _draw_wires(triangle_id, pixels, faces, half_width, wires):
    """Fill ``wires (H, W)`` with the opacity, 0..1, of the edges of the triangle that is seen at each pixel."""
    for row in range(triangle_id.shape[0]):
        for column in range(triangle_id.shape[1]):
            face = triangle_id[row, column]
            if face < 0:
                continue
            nearest, longest, area = np.inf, 0.0, 0.0
            for edge in range(3):
                a, b = pixels[faces[face, edge]], pixels[faces[face, (edge + 1) % 3]]
                x, y = b[0] - a[0], b[1] - a[1]
                length = math.sqrt(x * x + y * y)
                longest = max(longest, length)
                area += a[0] * b[1] - a[1] * b[0]
                if length > 0.0:
                    off = abs((column + 0.5 - a[0]) * y - (row + 0.5 - a[1]) * x) / length
                    nearest = min(nearest, off)
            # The edges of a triangle that is hardly wider than they are would fill it: they fade.
            room = abs(area) / (longest * 6.0 * half_width) if longest > 0.0 else 0.0
            wires[row, column] = min(max(half_width + 0.5 - nearest, 0.0), 1.0) * min(room, 1.0)


def _outline(inside: np.ndarray, supersampling: int, width_px: float) -> np.ndarray:
    """``(H, W)`` opacity of the rim, just inside, of a mask on the finer grid; the image's border is no rim."""
    core = inside
    for _ in range(max(1, round(width_px * supersampling / 2))):
        wide = np.pad(core, 1, mode="edge")
        core = core & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return _averaged((inside & ~core).astype(np.float32), supersampling)


def _averaged(fine: np.ndarray, factor: int) -> np.ndarray:
    height, width = fine.shape[0] // factor, fine.shape[1] // factor
    return fine.reshape(height, factor, width, factor).mean(axis=(1, 3))


def _painted(picture: np.ndarray, opacity: np.ndarray, colour: _Colour) -> np.ndarray:
    painted = picture + opacity[..., None] * (np.array(colour, np.float32) - picture)
    return (painted + 0.5).astype(np.uint8)


def _display_gamma(pixels: np.ndarray) -> float:
    """What brings the median level of the face's pixels ``(N, 3)`` to a comfortable one; 1 if it is not darker."""
    median = float(np.median(pixels.mean(axis=-1))) if len(pixels) else 255.0
    if median >= _DARK_LEVEL:
        return 1.0
    return round(max(_LEAST_GAMMA, math.log(_DARK_LEVEL / 255) / math.log(max(median, 1.0) / 255)), 2)


def _brightened(picture: np.ndarray, gamma: float) -> np.ndarray:
    levels = 255.0 * (np.arange(256) / 255.0) ** gamma
    return (levels + 0.5).astype(np.uint8)[picture]


def _captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """The picture with a line of text in a dark box in its lower left corner."""
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(14, canvas.height // 64))
    _, _, right, bottom = draw.textbbox((0, 0), caption, font)
    margin = bottom // 2
    top = canvas.height - bottom - 2 * margin
    draw.rectangle((0, top, right + 2 * margin, canvas.height), _PAPER)
    draw.text((margin, top + margin), caption, _INK, font)
    return np.asarray(canvas)


def _laid_out(title: str, labels: list[str], tiles: list[np.ndarray | str], tile_height: int) -> np.ndarray:
    """A sheet of labelled tiles; a tile that is a text is an empty one that bears it."""
    size = max(11, tile_height // 17)
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(round(1.4 * size))
    tile_width = max([tile.shape[1] for tile in tiles if not isinstance(tile, str)], default=tile_height)
    cell_w, cell_h = tile_width + _GAP_PX, tile_height + 2 * size + _GAP_PX
    columns = max(1, min(len(tiles), round(math.sqrt(len(tiles) * _SHEET_ASPECT * cell_h / cell_w))))
    rows = math.ceil(len(tiles) / columns)
    head = 3 * size
    width = max(columns * cell_w + _GAP_PX, math.ceil(title_font.getlength(title)) + 2 * _GAP_PX)
    sheet = Image.new("RGB", (width, head + rows * cell_h + _GAP_PX), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP_PX, head // 2), title, _INK, title_font, anchor="lm")
    for index, (label, tile) in enumerate(zip(labels, tiles, strict=True)):
        left, top = _GAP_PX + index % columns * cell_w, head + index // columns * cell_h
        middle = left + tile_width / 2
        if isinstance(tile, str):
            ground = _MISSING_TILE if tile == _MISSING else _BROKEN_TILE
            draw.rectangle((left, top, left + tile_width - 1, top + tile_height - 1), ground)
            text = tile if font.getlength(tile) <= tile_width else tile.replace("-", "-\n")
            draw.text((middle, top + tile_height / 2), text, _MUTED if tile == _MISSING else _INK, font, anchor="mm")
        else:
            sheet.paste(Image.fromarray(tile), (left + (tile_width - tile.shape[1]) // 2, top))
        draw.text((middle, top + tile_height + size), label, _INK, font, anchor="mm")
    return np.asarray(sheet)
