"""Avatars on disk: a folder that needs nothing else, and nothing that is executed.

avatar.json           format, config, ids, and the SHA-256 of the two other files
weights.safetensors   the parameters
context.npz           topology, normalisation and headset cameras (loaded without pickle)
"""

from __future__ import annotations

import hashlib
import io
import shutil
import uuid
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError

from lipflow.addresses import local_folder
from lipflow.config import AvatarConfig, StrictConfig
from lipflow.errors import LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext
from lipflow.types import Camera, Normalization, Topology

FORMAT_VERSION = 2
RECORD_FILE, WEIGHTS_FILE, CONTEXT_FILE = "avatar.json", "weights.safetensors", "context.npz"


class CheckpointError(LipflowError):
    """A folder that holds no avatar, or a damaged one."""


class _AvatarRecord(StrictConfig):
    """The content of ``avatar.json``."""

    format: Literal["lipflow-avatar"]
    format_version: int
    config: AvatarConfig
    camera_ids: tuple[str, ...]
    train_camera_ids: tuple[str, ...]
    headset_camera_ids: tuple[str, ...]
    frontal_camera_id: str | None
    frontal_image_hw: tuple[int, int] | None
    keypoint_names: tuple[str, ...]
    landmarks: dict[str, int]
    sha256: dict[str, str]


def save_avatar(avatar: Avatar, folder: str | Path) -> None:
    """Write an avatar; the folder appears complete or not at all.

    Args:
        avatar: on any device.
        folder: local; must not exist, or be empty.

    Raises:
        CheckpointError: the folder is in use.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder: save the avatar to a new one")
    context = avatar.context
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in avatar.state_dict().items()}
    contents = {WEIGHTS_FILE: safetensors.torch.save(weights), CONTEXT_FILE: _pack_context(context)}
    record = _AvatarRecord(
        format="lipflow-avatar",
        format_version=FORMAT_VERSION,
        config=avatar.config,
        camera_ids=context.camera_ids,
        train_camera_ids=context.train_camera_ids,
        headset_camera_ids=tuple(camera.camera_id for camera in context.headset_cameras),
        frontal_camera_id=context.frontal_camera_id,
        frontal_image_hw=context.frontal_image_hw,
        keypoint_names=context.keypoint_names,
        landmarks={name: int(vertex) for name, vertex in context.topology.landmarks.items()},
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    )
    contents[RECORD_FILE] = record.model_dump_json(indent=2).encode() + b"\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_avatar(folder: str | Path, device: torch.device | str = "cpu") -> Avatar:
    """Read an avatar that :func:`save_avatar` wrote, in evaluation mode.

    Args:
        folder: that it was written to, or an address such as ``models:/lipflow@champion``; :mod:`lipflow.addresses`
            says which there are.
        device: for its tensors.

    Raises:
        CheckpointError: the folder holds no avatar, one of a newer format, or damaged files.
        LipflowError: the address cannot be fetched.
    """
    with local_folder(folder) as found:
        return _load_folder(found, device)


def _load_folder(folder: Path, device: torch.device | str) -> Avatar:
    record = _read_record(folder)
    contents = {name: _read_verified(folder, name, record) for name in (WEIGHTS_FILE, CONTEXT_FILE)}
    avatar = Avatar(record.config, _unpack_context(contents[CONTEXT_FILE], record, folder))
    try:
        weights = safetensors.torch.load(contents[WEIGHTS_FILE])
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read ({error}): fetch the avatar again") from error
    expected = {name: tuple(tensor.shape) for name, tensor in avatar.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit its config in {len(differing)} tensors such as {differing[0]}: "
            "fetch the avatar again"
        )
    avatar.load_state_dict(weights)
    return avatar.to(device).eval()


def _read_record(folder: Path) -> _AvatarRecord:
    path = folder / RECORD_FILE
    try:
        record = _AvatarRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no avatar: expected a folder with {RECORD_FILE}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "its text"
        raise CheckpointError(
            f"{path} is damaged or of another format ({place}: {first['msg']}): fetch the avatar again, or use the "
            "version that wrote it"
        ) from error
    if record.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {record.format_version}, expected {FORMAT_VERSION}: use the version that "
            "wrote it"
        )
    return record


def _read_verified(folder: Path, name: str, record: _AvatarRecord) -> bytes:
    path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: fetch the avatar again") from error
    if hashlib.sha256(content).hexdigest() != record.sha256.get(name):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {RECORD_FILE}; fetch it again")
    return content


def _pack_context(context: AvatarContext) -> bytes:
    topology, statistics, headset = context.topology, context.normalization, context.headset_cameras
    buffer = io.BytesIO()
    np.savez(
        buffer,
        faces=topology.faces,
        uvs=topology.uvs,
        uv_faces=topology.uv_faces,
        weight_mask=topology.weight_mask,
        num_vertices=np.int64(topology.num_vertices),
        texture_mean=statistics.texture_mean,
        texture_std=np.float64(statistics.texture_std),
        vertices_mean=statistics.vertices_mean,
        vertices_std=np.float64(statistics.vertices_std),
        headset_intrinsics=np.array([camera.intrinsics for camera in headset], np.float64).reshape(-1, 3, 3),
        headset_cam_from_head=np.array([camera.cam_from_world for camera in headset], np.float64).reshape(-1, 3, 4),
        headset_image_size_hw=np.array([camera.image_size_hw for camera in headset], np.int64).reshape(-1, 2),
        headset_distortion=np.array([camera.distortion for camera in headset], np.float64).reshape(-1, 5),
    )
    return buffer.getvalue()


def _unpack_context(content: bytes, record: _AvatarRecord, folder: Path) -> AvatarContext:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        headset = tuple(
            Camera(camera_id, intrinsics, cam_from_head, (int(size[0]), int(size[1])), distortion)
            for camera_id, intrinsics, cam_from_head, size, distortion in zip(
                record.headset_camera_ids,
                arrays["headset_intrinsics"],
                arrays["headset_cam_from_head"],
                arrays["headset_image_size_hw"],
                arrays["headset_distortion"],
                strict=True,
            )
        )
        topology = Topology(
            faces=arrays["faces"],
            uvs=arrays["uvs"],
            uv_faces=arrays["uv_faces"],
            weight_mask=arrays["weight_mask"],
            landmarks=record.landmarks,
            num_vertices=int(arrays["num_vertices"]),
        )
        statistics = Normalization(
            texture_mean=arrays["texture_mean"],
            texture_std=float(arrays["texture_std"]),
            vertices_mean=arrays["vertices_mean"],
            vertices_std=float(arrays["vertices_std"]),
        )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{folder / CONTEXT_FILE} cannot be read ({error}): fetch the avatar again") from error
    return AvatarContext(
        topology=topology,
        normalization=statistics,
        camera_ids=record.camera_ids,
        train_camera_ids=record.train_camera_ids,
        headset_cameras=headset,
        frontal_camera_id=record.frontal_camera_id,
        frontal_image_hw=record.frontal_image_hw,
        keypoint_names=record.keypoint_names,
    )
