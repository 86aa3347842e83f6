"""The import job: ``lipflow import-multiface CHECKPOINT OUT --capture CAPTURE`` makes an avatar of public weights.

A checkpoint of the public Multiface code holds weights alone; topology, statistics and cameras come from the capture
that it was trained on.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption
from lipflow.checkpoint import RECORD_FILE, save_avatar
from lipflow.errors import CaptureError, ConfigError
from lipflow.model.context import AvatarContext
from lipflow.multiface import avatar_from_multiface, read_multiface_weights
from lipflow.types import Normalization
from pipeline import storage
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture


@dataclass(frozen=True)
class ImportSummary:
    """What was imported.

    Attributes:
        avatar: URI of the avatar's folder.
        latent_size: length of z.
        spatial_bias, residual, upsample, warp_field: the architecture; see ``lipflow.config.AvatarConfig``.
        cameras: with colour correction, the anchor included.
        parameters: numbers in the weights.
    """

    avatar: str
    latent_size: int
    spatial_bias: bool
    residual: bool
    upsample: str
    warp_field: bool
    cameras: int
    parameters: int


def import_multiface(checkpoint_uri: str, out_uri: str, capture_uri: str) -> ImportSummary:
    """Write the avatar of a public Multiface checkpoint.

    Args:
        checkpoint_uri: ``model.pth`` or ``best_model.pth`` of the public ``train.py``.
        out_uri: the avatar's folder.
        capture_uri: the capture that it was trained on, with its ``tex_mean.png``, ``tex_var.txt``, ``vert_mean.bin``
            and ``vert_var.txt``.

    Raises:
        CheckpointError: the weights are none of the public models', or do not fit the capture.
        ConfigError: an avatar lies at ``out_uri``.
        CaptureError: no capture, or one without statistics of its own.
        StorageError: a file cannot be read or written.
    """
    out_uri = storage.normalize_uri(out_uri)
    if storage.exists(storage.join(out_uri, RECORD_FILE)):
        raise ConfigError(f"{out_uri}: an avatar lies there already; give another OUT, or remove it")
    capture = open_capture(capture_uri)
    statistics = capture.normalization()
    if statistics is None:
        raise CaptureError(
            f"{capture.uri}: the capture has no statistics of its own, with which the weights were trained; fetch its "
            "tex_mean.png, tex_var.txt, vert_mean.bin and vert_var.txt"
        )
    checkpoint_uri = storage.normalize_uri(checkpoint_uri)
    weights = read_multiface_weights(io.BytesIO(storage.read_bytes(checkpoint_uri)), name=checkpoint_uri)
    avatar = avatar_from_multiface(weights, _context(capture, statistics))
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "avatar")
        save_avatar(avatar, local)
        storage.upload_dir(local, out_uri)
    config = avatar.config
    return ImportSummary(
        avatar=out_uri,
        latent_size=config.latent_size,
        spatial_bias=config.spatial_bias,
        residual=config.residual,
        upsample=config.upsample,
        warp_field=config.warp_field,
        cameras=len(capture.cameras),
        parameters=sum(parameter.numel() for parameter in avatar.parameters()),
    )


def _context(capture: Capture, statistics: Normalization) -> AvatarContext:
    """The public training showed every camera of the ``KRT``, in its order."""
    image_hw = {camera.camera_id: camera.image_size_hw for camera in capture.cameras}
    return AvatarContext(
        topology=capture.topology,
        normalization=statistics,
        camera_ids=tuple(image_hw),
        train_camera_ids=tuple(image_hw),
        headset_cameras=capture.headset_cameras,
        frontal_camera_id=capture.frontal_camera_id,
        frontal_image_hw=image_hw.get(capture.frontal_camera_id or ""),
        keypoint_names=capture.keypoint_names,
    )


def import_multiface_command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="model.pth: path, file:// or s3:// URI.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The avatar's folder: path, file:// or s3:// URI.")],
    capture: Annotated[str, typer.Option(metavar="CAPTURE", help="The capture that the model was trained on.")],
    as_json: JsonOption = False,
) -> None:
    """Make an avatar of weights that the public Multiface code trained."""
    summary = import_multiface(checkpoint, out, capture)
    switches = [name for name in ("spatial_bias", "residual", "warp_field") if getattr(summary, name)]
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.avatar}: {summary.parameters:,} weights, latent size {summary.latent_size}, upsample "
        f"{summary.upsample}, {', '.join(switches) or 'no switches'}, colours of {summary.cameras} cameras",
    )


if __name__ == "__main__":
    command.run_job("cluster.import_multiface", "import_multiface_command")
