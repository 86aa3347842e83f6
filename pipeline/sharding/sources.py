"""The captures of a shard set: the cameras that they share, and how the frames of each are stored.

Several captures of one set show the same topology, through cameras that are the same where they have the same id:
there is one list of cameras, and one frontal camera. Calibrations may differ: each capture keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lipflow.errors import ConfigError
from lipflow.types import Camera
from pipeline import storage
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.captures.view import SelectedCameras
from pipeline.driving.driven import DrivingConfig, with_driving
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.samples import SampleSettings
from pipeline.sharding.segment_names import CAPTURE_NAME, stored_segment
from pipeline.sharding.splits import split_cameras

Captures = Capture | str | Mapping[str, Capture | str]
"""An open capture, or its URI; several by name. The name of an only one is not used."""


@dataclass(frozen=True)
class CapturePlace:
    """What a worker needs to open a capture as it is stored; small, and picklable.

    Attributes:
        uri: of the capture.
        camera_ids: the dome cameras that are stored.
        driving: with the frontal camera of the whole set.
        settings: how each frame is stored.
    """

    uri: str
    camera_ids: tuple[str, ...]
    driving: DrivingConfig
    settings: SampleSettings

    def open(self) -> StoredCapture:
        """The capture itself.

        Raises:
            CaptureError: it cannot be opened.
        """
        capture = _selected(open_capture(self.uri), self.camera_ids)
        return StoredCapture(with_driving(capture, self.driving), self)


@dataclass(frozen=True)
class StoredCapture:
    """One capture of a set: with its stored cameras alone, and with driving signals."""

    capture: Capture
    place: CapturePlace

    @property
    def settings(self) -> SampleSettings:
        """How each frame is stored."""
        return self.place.settings

    @property
    def name(self) -> str | None:
        """Of the capture in this set; None for an only one."""
        return self.place.settings.capture_name


@dataclass(frozen=True)
class ShardSources:
    """All captures of a set; use :func:`open_for_sharding`.

    Attributes:
        captures: in the order of their names.
        train_camera_ids: the training cameras.
        test_camera_ids: those that are held out.
    """

    captures: tuple[StoredCapture, ...]
    train_camera_ids: tuple[str, ...]
    test_camera_ids: tuple[str, ...]

    @property
    def uri(self) -> str:
        """Of the capture, or of all captures, for messages."""
        return ", ".join(stored.capture.uri for stored in self.captures)

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The cameras that any capture has, each as the first capture has it that has it."""
        return _joint_cameras([stored.capture for stored in self.captures])

    @property
    def frontal_camera_id(self) -> str | None:
        """Of all captures."""
        return self.captures[0].capture.frontal_camera_id

    @cached_property
    def segments(self) -> dict[str, tuple[str, ...]]:
        """Segment, as the set calls it, to its frames."""
        return {
            stored_segment(segment, stored.name): frames
            for stored in self.captures
            for segment, frames in stored.capture.segments.items()
        }

    def of(self, capture_name: str | None) -> StoredCapture:
        """The capture of that name."""
        return next(stored for stored in self.captures if stored.name == capture_name)


def named_captures(addresses: Sequence[str]) -> str | dict[str, str]:
    """Captures as a command line names them: one address, or several of ``NAME=URI`` or an URI that ends in a name.

    Raises:
        ConfigError: none, two of one name, or an address whose end cannot be a name.
    """
    if not addresses:
        raise ConfigError("no capture is named; give at least one")
    if len(addresses) == 1:
        return addresses[0]
    named: dict[str, str] = {}
    for address in addresses:
        name, sign, uri = address.partition("=")
        if not sign or not CAPTURE_NAME.fullmatch(name):
            name, uri = storage.normalize_uri(address).rstrip("/").rpartition("/")[2], address
        if not CAPTURE_NAME.fullmatch(name):
            raise ConfigError(f"{address}: {name!r} cannot name a capture (letters, digits, _ + - .); give NAME={uri}")
        if name in named:
            raise ConfigError(f"{named[name]} and {uri} are both called {name!r}; give NAME=URI for one of them")
        named[name] = uri
    return named


def open_for_sharding(captures: Captures, config: ShardConfig) -> ShardSources:
    """The captures as they are stored: the cameras of the splits alone, and with driving signals.

    Args:
        captures: one, or several by name; their order does not matter.
        config: with splits that name no files any more; see :func:`pipeline.sharding.splits.with_split_files`.

    Raises:
        CaptureError: there is no such capture.
        ConfigError: splits or driving signals that do not fit, or captures that cannot be in one set.
    """
    opened = _opened(captures)
    raw = list(opened.values())
    train, test = split_cameras(_Rig(_joint_cameras(raw), _declared_frontal(raw, config)), config.splits)
    kept = {*train, *test}
    for capture in raw:
        if not any(camera.camera_id in train for camera in capture.cameras):
            raise ConfigError(
                f"{capture.uri}: has none of the training cameras ({', '.join(train[:8])}...); leave it out"
            )
    selected = [_selected(capture, [c.camera_id for c in capture.cameras if c.camera_id in kept]) for capture in raw]
    driven = _driven(selected, config, train)
    _check_one_set(driven, config)
    # Anew: cameras that are drawn by number spare the frontal one, which driving may only now have found.
    train, test = split_cameras(_Rig(_joint_cameras(driven), driven[0].frontal_camera_id), config.splits)
    driving = config.driving
    if driven[0].frontal_camera_id is not None:
        driving = driving.model_copy(update={"frontal_camera": driven[0].frontal_camera_id})
    stored = []
    for name, capture in zip(opened, driven, strict=True):
        ids = tuple(camera.camera_id for camera in capture.cameras)
        settings = SampleSettings(
            image_size_hw=config.image_size_hw or capture.cameras[0].image_size_hw,
            texture_size=config.texture_size or capture.texture_size,
            codec=config.codec,
            quality=config.quality,
            chroma=config.chroma,
            texture_codec=config.texture_codec,
            resize_filter=config.resize_filter,
            store_view_textures=config.store_view_textures,
            unwrap_camera_ids=tuple(camera_id for camera_id in train if camera_id in ids),
            capture_name=name,
        )
        stored.append(StoredCapture(capture, CapturePlace(capture.uri, ids, driving, settings)))
    return ShardSources(tuple(stored), tuple(train), tuple(test))


@dataclass(frozen=True)
class _Rig:
    cameras: tuple[Camera, ...]
    frontal_camera_id: str | None


def _opened(captures: Captures) -> dict[str | None, Capture]:
    """The captures by name, sorted; None is the name of an only one."""
    if not isinstance(captures, Mapping):
        captures = {"capture": captures}
    if not captures:
        raise ConfigError("no capture is named; give at least one")
    opened = {
        name: open_capture(capture) if isinstance(capture, str) else capture
        for name, capture in sorted(captures.items())
    }
    if len(opened) == 1:
        return {None: next(iter(opened.values()))}
    places: dict[str, str] = {}
    named: dict[str | None, Capture] = {}
    for name, capture in opened.items():
        if not CAPTURE_NAME.fullmatch(name):
            raise ConfigError(f"{capture.uri}: {name!r} cannot name a capture (letters, digits, _ + - .); rename it")
        if capture.uri in places:
            raise ConfigError(f"{capture.uri} is given twice, as {places[capture.uri]!r} and {name!r}; leave one out")
        places[capture.uri], named[name] = name, capture
    return named


def _selected(capture: Capture, camera_ids: Sequence[str]) -> Capture:
    return SelectedCameras(capture, camera_ids) if len(camera_ids) < len(capture.cameras) else capture


def _joint_cameras(captures: Sequence[Capture]) -> tuple[Camera, ...]:
    cameras: dict[str, Camera] = {}
    for capture in captures:
        for camera in capture.cameras:
            cameras.setdefault(camera.camera_id, camera)
    return tuple(cameras.values())


def _declared_frontal(captures: Sequence[Capture], config: ShardConfig) -> str | None:
    """The frontal camera that is known before one is looked for; every capture has to have it.

    Raises:
        ConfigError: the captures declare several, or one lacks it.
    """
    if len(captures) == 1:
        return captures[0].frontal_camera_id
    chosen = config.driving.frontal_camera if config.driving.render != "never" else None
    declaring = {capture.frontal_camera_id: capture for capture in captures if capture.frontal_camera_id is not None}
    if chosen is None and len(declaring) > 1:
        (one, first), (other, second) = list(declaring.items())[:2]
        raise ConfigError(
            f"{first.uri} and {second.uri} declare other frontal cameras, {one} and {other}; "
            "set shard.driving.frontal_camera to one that all captures have"
        )
    chosen = chosen or next(iter(declaring), None)
    for capture in captures:
        if chosen is not None and all(camera.camera_id != chosen for camera in capture.cameras):
            having = next((c for c in captures if any(camera.camera_id == chosen for camera in c.cameras)), None)
            raise ConfigError(
                f"{capture.uri}: has no camera {chosen!r}, the frontal camera"
                + (f" of {having.uri}" if having else "")
                + "; set shard.driving.frontal_camera to one that all captures have"
            )
    return chosen


def _driven(captures: Sequence[Capture], config: ShardConfig, train: Sequence[str]) -> list[Capture]:
    """The captures with driving signals; the first one's frontal camera is that of all."""
    # Cameras that are drawn by number spare the frontal one, which is therefore chosen first.
    among = list(train) if config.splits.test_cameras else None
    if len(captures) == 1:
        return [with_driving(captures[0], config.driving, frontal_among=among)]
    shared = set.intersection(*({camera.camera_id for camera in capture.cameras} for capture in captures))
    if not shared:
        raise ConfigError(
            f"{captures[0].uri} and {captures[1].uri}: no camera is in all captures of the set, so none can be the"
            " frontal one; write sets of their own"
        )
    driving = config.driving
    frontal_id = driving.frontal_camera or next((c.frontal_camera_id for c in captures if c.frontal_camera_id), None)
    driven = []
    for capture in captures:
        driving = driving.model_copy(update={"frontal_camera": frontal_id})
        candidates = shared if among is None else shared & set(among)
        driven.append(with_driving(capture, driving, frontal_among=candidates))
        frontal_id = frontal_id or driven[0].frontal_camera_id
    return driven


def _check_one_set(captures: Sequence[Capture], config: ShardConfig) -> None:
    """Refuse captures that cannot be in one set, or whose frames would not have one size.

    Raises:
        ConfigError: naming two captures, what differs, and the setting.
    """
    first = captures[0]
    if config.image_size_hw is None:
        for capture in captures:
            sizes = {tuple(camera.image_size_hw) for camera in capture.cameras}
            if len(sizes) != 1:
                raise ConfigError(
                    f"{capture.uri}: cameras with {len(sizes)} image sizes; set shard.image_size_hw to store one size"
                )
    for other in captures[1:]:
        for what, own, its, remedy in _that_must_agree(first, other, config):
            if own != its:
                raise ConfigError(f"{first.uri} and {other.uri}: {what} differ ({own}, {its}); {remedy}")


def _that_must_agree(first: Capture, other: Capture, config: ShardConfig) -> Iterator[tuple[str, object, object, str]]:
    """What, how either capture has it, and the remedy."""
    apart, one_file = "write sets of their own", "set shard.driving.landmarks to one file for all"
    mine, its = first.topology, other.topology
    yield "numbers of vertices", mine.num_vertices, its.num_vertices, apart
    for name in ("faces", "uvs", "uv_faces"):
        own, others = getattr(mine, name), getattr(its, name)
        yield f"{name} of the topologies", *_told_apart(own, others, np.array_equal(own, others)), apart
    if config.texture_size is None:
        yield "texture sizes", first.texture_size, other.texture_size, "set shard.texture_size to store one size"
    if config.image_size_hw is None:
        size, its_size = (tuple(capture.cameras[0].image_size_hw) for capture in (first, other))
        yield "image sizes (height, width)", size, its_size, "set shard.image_size_hw to store one size"
    frontal = "set shard.driving.frontal_camera, with shard.driving.render=missing"
    yield "frontal cameras", first.frontal_camera_id, other.frontal_camera_id, frontal
    landmarks = mine.landmarks == its.landmarks and list(mine.landmarks) == list(its.landmarks)
    yield "landmarks", *_told_apart(mine.landmarks, its.landmarks, landmarks), one_file
    keypoints = first.keypoint_names == other.keypoint_names
    yield "keypoints", *_told_apart(first.keypoint_names, other.keypoint_names, keypoints), one_file
    headset, its_headset = (
        [(camera.camera_id, *camera.image_size_hw) for camera in capture.headset_cameras] for capture in (first, other)
    )
    yield "headset cameras", headset, its_headset, apart


def _told_apart(own: Sized, others: Sized, same: bool) -> tuple[str, str]:
    """Both told by their lengths, as they are too long to be shown: the same text only where they are the same."""
    return (f"{len(own)}",) * 2 if same else (f"{len(own)}", f"{len(others)} others")
