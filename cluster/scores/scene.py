"""An avatar and a shard set that belong together: what jobs check first, and what their workers keep open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lipflow.checkpoint import load_avatar
from lipflow.config import RenderConfig
from lipflow.errors import ConfigError
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext
from lipflow.regions import face_regions, vertex_regions
from lipflow.render.renderer import Renderer
from pipeline import storage
from pipeline.loading.loader import ShardSet


@dataclass(frozen=True)
class Scene:
    """What a worker keeps between its tasks.

    The renderer's weights and the regions follow from the shard set, so they are the same for all avatars.

    Attributes:
        avatar: in evaluation mode.
        renderer: of the set's topology.
        shards: the shard set.
    """

    avatar: Avatar
    renderer: Renderer
    shards: ShardSet

    @cached_property
    def vertex_labels(self) -> Tensor:
        """``(V,)`` region of every vertex."""
        return torch.from_numpy(vertex_regions(self.shards.topology, self.shards.normalization.vertices_mean))

    @cached_property
    def face_labels(self) -> Tensor:
        """``(F,)`` region of every triangle."""
        return torch.from_numpy(face_regions(self.shards.topology, self.vertex_labels.numpy()))


@lru_cache(maxsize=2)
def open_scene(avatar_uri: str, shards_uri: str, render: RenderConfig) -> Scene:
    """The scene of these addresses, opened once in a process."""
    with TemporaryDirectory() as folder:
        local = Path(folder, "avatar")
        storage.download_dir(avatar_uri, local)
        avatar = load_avatar(local).eval()
    shards = ShardSet.open(shards_uri)
    return Scene(avatar, Renderer(shards.topology, render.backend, filter=render.filter), shards)


def context_of(shards: ShardSet) -> AvatarContext:
    """What a shard set says of its capture: faces, cameras and driving signals."""
    frontal = {camera.camera_id: camera.image_size_hw for camera in shards.cameras}.get(shards.frontal_camera_id or "")
    return AvatarContext(
        topology=shards.topology,
        normalization=shards.normalization,
        camera_ids=tuple(camera.camera_id for camera in shards.cameras),
        train_camera_ids=tuple(shards.train_camera_ids),
        headset_cameras=tuple(shards.headset_cameras),
        frontal_camera_id=shards.frontal_camera_id,
        frontal_image_hw=frontal,
        keypoint_names=tuple(shards.keypoint_names),
    )


def drivable_signals(avatar: Avatar, wanted: Sequence[str] | None, setting: str) -> tuple[str, ...]:
    """The signals to drive an avatar by, in its own order: those that are wanted, or all that it can be driven by.

    A prior that nothing drives says the same whatever is shown: it can be fitted to all that the capture offers.

    Raises:
        ConfigError: the avatar cannot be driven by one of them; the message names the ``setting`` that asks for it.
    """
    possible = avatar.signals if avatar.config.has_drivers else avatar.context.offered_signals
    lacking = [signal for signal in wanted or () if signal not in possible]
    if lacking:
        raise ConfigError(f"{setting} {lacking[0]}: the avatar cannot be driven by it, but by {', '.join(possible)}")
    return tuple(signal for signal in possible if not wanted or signal in wanted)
