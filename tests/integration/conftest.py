"""One small capture and its shard set, made once by the jobs themselves on the session's Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.records.tracking import TrackingConfig
from cluster.shard import ShardRecipe, ShardSummary, shard
from cluster.synth import SynthSummary, synthesise
from cluster.training.recipe import TrainRecipe
from lipflow.config import AvatarConfig
from pipeline.dome.writer import DomeConfig
from pipeline.loading.loader import LoaderConfig
from pipeline.sharding.shards import ShardConfig
from pipeline.sharding.splits import SplitConfig
from tests.integration.running_stack import RunningStack, stack_of_our_own

DOME = DomeConfig(
    cameras=7,
    image_size_hw=(48, 36),
    texture_size=32,
    segments=4,
    frames_per_segment=3,
    headset_image_size_hw=(16, 20),
    supersampling=1,
)
SHARD = ShardConfig(frames_per_shard=3, splits=SplitConfig(test_camera_count=2))


def _tiny_training(tracking: TrackingConfig, **changes: Any) -> TrainRecipe:
    """A LiP-Flow training of seconds."""
    settings: dict[str, Any] = {
        "avatar": AvatarConfig.small(
            texture_size=32,
            latent_size=8,
            hidden_size=16,
            encoder_channels=(8, 8, 8, 4),
            decoder_channels=(8, 8, 8, 4),
            driver_image_size=16,
            driver_channels=(8, 8),
            driver_hidden_size=16,
            flow_hidden_size=8,
        ),
        "loader": LoaderConfig(frames_per_batch=2, views_per_frame=2, decode_threads=1),
        "steps": 6,
        "warmup_steps": 2,
        "checkpoint_every_steps": 3,
        "log_every_steps": 1,
        "validation_frames": 2,
        "validation_cameras": 2,
        "tracking": tracking,
    }
    return TrainRecipe(**(settings | changes))


@dataclass(frozen=True)
class Shards:
    """The set, what it was made from, and what the jobs said when they made it."""

    capture: str
    dome: DomeConfig
    uri: str
    config: ShardConfig
    synth: SynthSummary
    summary: ShardSummary
    tracking: TrackingConfig


@pytest.fixture(scope="session")
def shards(ray_session, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    root: Path = tmp_path_factory.mktemp("integration")
    tracking = TrackingConfig(uri=f"sqlite:///{root}/mlflow.db")
    synth = synthesise(str(root / "capture"), DOME)
    summary = shard(synth.capture, str(root / "shards"), ShardRecipe(shard=SHARD, tracking=tracking))
    return Shards(synth.capture, DOME, summary.shards, SHARD, synth, summary, tracking)


@pytest.fixture(scope="session")
def tiny_training() -> Callable[..., TrainRecipe]:
    """A recipe for a training of seconds: ``tiny_training(tracking, **changes)``."""
    return _tiny_training


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    """``lipflow stack up``: S3, MLflow and Ray servers of the module's own."""
    with stack_of_our_own() as running:
        yield running
