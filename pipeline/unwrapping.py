"""The textures that a capture lacks, made from its images: ``unwrapped_uv_1024/SEG/{average,CAM}/FRAME.png``.

:func:`plan_unwrapping` says what is absent, and :func:`unwrap_frames` writes it, a run of frames a call, in any order
and in parallel. A file that is there is never written again, so a second run goes on where the first one ended.

The files are RGBA PNGs, row 0 is v = 1. Alpha is 0 where no camera saw the texel; its colour is then the mean of the
others, for readers that drop alpha.

The average decides what an encoder sees of a frame. Whoever holds cameras out for evaluation has to leave them out
here (``cameras``), or their images reach the model through the average.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lipflow.config import StrictConfig
from lipflow.errors import CaptureError, ConfigError
from lipflow.render.camera import cam_from_head_tensor
from lipflow.render.unwrap import TexelSurface, TextureAverage, Unwrapper, fill_unseen
from pipeline import storage
from pipeline.capture import Capture, CaptureFrame
from pipeline.capture_errors import check_image_size
from pipeline.captures.multiface import TEXTURE_FOLDER
from pipeline.captures.opening import open_capture
from pipeline.corrupt_files import CorruptFilesError
from pipeline.images.codecs import CodecError, decode_any_image, encode_image
from pipeline.manifest import SkippedFile
from pipeline.sharding.undistort import Undistorter

AVERAGE = "average"
DEFAULT_TEXTURE_SIZE = 1024
"""Where neither the configuration nor the capture says."""

SETTINGS_FILE = "unwrap.json"
"""Beside the textures: what they were made with, so that no run adds to them with other settings."""


class UnwrapConfig(StrictConfig):
    """What is unwrapped, and how.

    Attributes:
        texture_size: edge length of the textures, texels; None: the capture's own, else 1024.
        cameras: shell patterns of the cameras whose images are unwrapped; empty: all. Held-out cameras do not belong
            among them.
        views: whether each camera's own texture is written, too; some 0.8 MB a view at 1024 texels.
        frames_per_task: frames that one task unwraps.
    """

    texture_size: int | None = Field(None, ge=16, le=8192)
    cameras: tuple[str, ...] = ()
    views: bool = False
    frames_per_task: int = Field(8, ge=1)


@dataclass(frozen=True)
class UnwrapSettings:
    """The configuration with what it leaves to the capture filled in.

    Attributes:
        texture_size: texels along one side.
        camera_ids: in calibration order.
        views: whether each camera's own texture is written.
    """

    texture_size: int
    camera_ids: tuple[str, ...]
    views: bool


@dataclass(frozen=True)
class UnwrapPlan:
    """What is to be done.

    Attributes:
        out_uri: the folder that holds, or will hold, ``unwrapped_uv_1024``.
        settings: of all tasks.
        tasks: segment and frame stems of each; only frames of which a texture is absent.
        kept: averages that are there already.
    """

    out_uri: str
    settings: UnwrapSettings
    tasks: tuple[tuple[str, tuple[str, ...]], ...]
    kept: int


@dataclass(frozen=True)
class UnwrapReport:
    """What was done with some frames.

    Attributes:
        averages: average textures written.
        views: textures of single cameras written.
        seen_fractions: of each average written, the part of the atlas that a camera saw.
        missing_views: images that the capture lacks.
        unseen_frames: ``SEG/FRAME`` of frames without any image, which get no average.
        unusable: corrupt files; the frame of one gets no average.
    """

    averages: int = 0
    views: int = 0
    seen_fractions: tuple[float, ...] = ()
    missing_views: int = 0
    unseen_frames: tuple[str, ...] = ()
    unusable: tuple[SkippedFile, ...] = ()

    @staticmethod
    def total(parts: Iterable[UnwrapReport]) -> UnwrapReport:
        """All parts together."""
        parts = tuple(parts)
        return UnwrapReport(
            averages=sum(part.averages for part in parts),
            views=sum(part.views for part in parts),
            seen_fractions=tuple(fraction for part in parts for fraction in part.seen_fractions),
            missing_views=sum(part.missing_views for part in parts),
            unseen_frames=tuple(frame for part in parts for frame in part.unseen_frames),
            unusable=tuple(file for part in parts for file in part.unusable),
        )


class FrameUnwrapper:
    """Reads textures out of the images of one capture, one image in memory at a time.

    Args:
        capture: where the images come from; lens distortion is taken out of them.
        texture_size: T, texels along one side.
        camera_ids: the cameras that will be read.

    Raises:
        CaptureError: a camera's lens model cannot be used.
    """

    def __init__(self, capture: Capture, texture_size: int, camera_ids: Iterable[str]):
        wanted = set(camera_ids)
        self.texture_size = texture_size
        self._unwrapper = Unwrapper(capture.topology, texture_size)
        self._cameras = {camera.camera_id: camera for camera in capture.cameras if camera.camera_id in wanted}
        self._lenses = {camera_id: Undistorter(camera) for camera_id, camera in self._cameras.items()}

    def surface(self, vertices: np.ndarray) -> TexelSurface:
        """Texture space on the mesh ``(V, 3)`` of one frame."""
        return self._unwrapper.surface(torch.from_numpy(np.asarray(vertices, np.float32)))

    def read(
        self, source: CaptureFrame, camera_id: str, surface: TexelSurface, world_from_head: np.ndarray
    ) -> tuple[Tensor, Tensor] | None:
        """The texture ``(3, T, T)`` and the weights ``(T, T)`` of one camera; None if the view is missing.

        Raises:
            CaptureError: the image is not of the size that the camera is calibrated for.
            CodecError: the file is corrupt.
        """
        body = source.image_file(camera_id)
        if body is None:
            return None
        path = source.source_of("image", camera_id)
        image = decode_any_image(body, path)
        camera, lens = self._cameras[camera_id], self._lenses[camera_id]
        check_image_size(image.shape[:2], camera, path)
        return self._unwrapper.read(
            surface,
            lens.apply(image),
            torch.from_numpy(np.asarray(camera.intrinsics, np.float64)),
            cam_from_head_tensor(camera.cam_from_world, world_from_head),
            lens.coverage(),
        )

    def seen_fraction(self, seen: Tensor) -> float:
        """The part of the atlas that is ``seen (T, T)``."""
        covered = self._unwrapper.covered
        return float((seen & covered).sum() / covered.sum())


def encode_texture(texture: Tensor, seen: Tensor) -> bytes:
    """``(3, T, T)`` of 0..255 with its mask ``(T, T)`` as an RGBA PNG whose row 0 is v = 1."""
    colour = texture.round().clamp(0, 255).byte()
    rgba = torch.cat([colour, seen[None].byte() * 255]).permute(1, 2, 0).numpy()
    return encode_image(rgba[::-1], "png")


def plan_unwrapping(capture: Capture, config: UnwrapConfig, out_uri: str | None = None) -> UnwrapPlan:
    """What is absent, by listing alone.

    Args:
        capture: the images.
        config: the settings.
        out_uri: where the textures go; None: into the capture itself.

    Raises:
        ConfigError: no place to write to, a pattern that fits no camera, a size other than that of the capture's
            textures, or textures there that were made with other settings.
    """
    if out_uri is None and capture.layout != "multiface":
        raise ConfigError(
            f"{capture.uri}: textures cannot be added to a capture in the {capture.layout} layout; "
            "give OUT, a folder for them"
        )
    out_uri = storage.normalize_uri(out_uri or capture.uri)
    settings = _settings(capture, config, out_uri)
    _check_settings_file(out_uri, settings)
    tasks, kept = [], 0
    for segment, frames in capture.segments.items():
        present = _present(out_uri, segment, settings)
        images = capture.listing(segment).images if settings.views else {}
        kept += len(present[AVERAGE] & set(frames))
        absent = [frame for frame in frames if _absent(frame, present, images)]
        for start in range(0, len(absent), config.frames_per_task):
            tasks.append((segment, tuple(absent[start : start + config.frames_per_task])))
    return UnwrapPlan(out_uri, settings, tuple(tasks), kept)


def write_settings(plan: UnwrapPlan) -> None:
    """Note beside the textures what they are made with; to be called before the first task.

    Raises:
        StorageError: the folder cannot be written.
    """
    storage.write_bytes(storage.join(plan.out_uri, TEXTURE_FOLDER, SETTINGS_FILE), _document(plan.settings))


def unwrap_frames(
    capture: Capture | str, settings: UnwrapSettings, segment: str, frames: tuple[str, ...], out_uri: str
) -> UnwrapReport:
    """Write what is absent of some frames of one segment; files that are there stay as they are.

    Args:
        capture: it, or its URI.
        settings: of the plan.
        segment: the segment.
        frames: stems.
        out_uri: of the plan.

    Returns:
        What was done. Corrupt files are in it, and not raised, so that a run finds all of them.

    Raises:
        CaptureError: the capture's calibration or topology cannot be used.
        StorageError: a file cannot be read or written.
    """
    if isinstance(capture, str):
        capture = open_capture(capture)
    unwrapper = FrameUnwrapper(capture, settings.texture_size, settings.camera_ids)
    present = _present(out_uri, segment, settings)
    return UnwrapReport.total(
        _unwrap_frame(unwrapper, capture.frame(segment, frame), settings, present, out_uri) for frame in frames
    )


def require_usable(capture_uri: str, unusable: tuple[SkippedFile, ...]) -> None:
    """Name the corrupt files that a run met.

    Raises:
        CorruptFilesError: there are any.
    """
    if not unusable:
        return
    raise CorruptFilesError(
        capture_uri,
        unusable,
        remedy="Fetch them again, or remove them, and run the same command again; all others are written",
        consequence=", and their frames got no average texture",
    )


def _unwrap_frame(
    unwrapper: FrameUnwrapper,
    source: CaptureFrame,
    settings: UnwrapSettings,
    present: Mapping[str, frozenset[str]],
    out_uri: str,
) -> UnwrapReport:
    def write(folder: str, texture: Tensor, seen: Tensor) -> None:
        target = storage.join(out_uri, TEXTURE_FOLDER, source.segment, folder, f"{source.frame}.png")
        storage.write_bytes(target, encode_texture(texture, seen))

    try:
        surface, pose = unwrapper.surface(source.vertices()), source.world_from_head()
    except CaptureError as error:
        return UnwrapReport(unusable=(SkippedFile(path=f"{source.segment}/{source.frame}", reason=str(error)),))
    needs_average = source.frame not in present[AVERAGE]
    total = TextureAverage(3, settings.texture_size)
    views, missing, unusable = 0, 0, []
    for camera_id in settings.camera_ids:
        needs_view = settings.views and source.frame not in present[camera_id]
        if not (needs_average or needs_view):
            continue
        try:
            view = unwrapper.read(source, camera_id, surface, pose)
        except (CaptureError, CodecError) as error:
            unusable.append(SkippedFile(path=source.source_of("image", camera_id), reason=str(error)))
            continue
        if view is None:
            missing += 1
            continue
        total.add(*view)
        if needs_view:
            seen = view[1] > 0
            write(camera_id, fill_unseen(view[0], seen), seen)
            views += 1
    report = UnwrapReport(views=views, missing_views=missing, unusable=tuple(unusable))
    if not needs_average or unusable:
        return report
    average, seen = total.mean()
    if not seen.any():
        return UnwrapReport.total([report, UnwrapReport(unseen_frames=(f"{source.segment}/{source.frame}",))])
    write(AVERAGE, average, seen)
    return UnwrapReport.total([report, UnwrapReport(averages=1, seen_fractions=(unwrapper.seen_fraction(seen),))])


def _settings(capture: Capture, config: UnwrapConfig, out_uri: str) -> UnwrapSettings:
    own = _own_texture_size(capture)
    size = config.texture_size or own or DEFAULT_TEXTURE_SIZE
    if out_uri == capture.uri and own is not None and size != own:
        raise ConfigError(
            f"{capture.uri}: its textures have {own} texels along a side, texture_size={size} would add others; "
            f"set texture_size={own}, or give another OUT"
        )
    ids = [camera.camera_id for camera in capture.cameras]
    for pattern in config.cameras:
        if not any(fnmatchcase(camera_id, pattern) for camera_id in ids):
            raise ConfigError(f"cameras: {pattern!r} fits none of {', '.join(ids)}")
    chosen = (
        camera_id
        for camera_id in ids
        if not config.cameras or any(fnmatchcase(camera_id, pattern) for pattern in config.cameras)
    )
    return UnwrapSettings(size, tuple(chosen), config.views)


def _own_texture_size(capture: Capture) -> int | None:
    try:
        return capture.texture_size
    except CaptureError:
        return None


def _document(settings: UnwrapSettings) -> bytes:
    return json.dumps({"texture_size": settings.texture_size, "cameras": settings.camera_ids}, indent=1).encode()


def _check_settings_file(out_uri: str, settings: UnwrapSettings) -> None:
    path = storage.join(out_uri, TEXTURE_FOLDER, SETTINGS_FILE)
    if storage.exists(path) and storage.read_bytes(path) != _document(settings):
        raise ConfigError(
            f"{path}: the textures there were unwrapped at another size or from other cameras than these "
            f"{len(settings.camera_ids)} at {settings.texture_size} texels; give another OUT, or the settings of that "
            "file"
        )


def _present(out_uri: str, segment: str, settings: UnwrapSettings) -> dict[str, frozenset[str]]:
    """Stems of the textures that are there, by folder: ``average`` and, where they are wanted, the cameras."""
    folders = (AVERAGE, *settings.camera_ids) if settings.views else (AVERAGE,)
    return {folder: _stems(storage.join(out_uri, TEXTURE_FOLDER, segment, folder)) for folder in folders}


def _stems(folder_uri: str) -> frozenset[str]:
    try:
        names = storage.listdir(folder_uri)
    except storage.ObjectNotFoundError:
        return frozenset()
    return frozenset(name.removesuffix(".png") for name in names if name.endswith(".png"))


def _absent(frame: str, present: Mapping[str, frozenset[str]], images: Mapping[str, frozenset[str]]) -> bool:
    """Whether the average, or the texture of a camera that has an image, is absent."""
    if frame not in present[AVERAGE]:
        return True
    return any(
        frame not in stems and frame in images.get(folder, ()) for folder, stems in present.items() if folder != AVERAGE
    )
