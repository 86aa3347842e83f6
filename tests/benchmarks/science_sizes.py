"""The sizes of the science study, and what it compares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lipflow.config import RenderConfig
from pipeline.dome.writer import DomeConfig
from pipeline.sharding.shards import ShardConfig
from pipeline.sharding.splits import SplitConfig

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dam": ({"method": "dam"}, {}),
    "lipflow": ({"method": "lipflow"}, {"prior_weight": 1.0}),
    "conditional+prior-rec": ({"method": "conditional"}, {"prior_weight": 1.0}),
    "conditional": ({"method": "conditional"}, {"prior_weight": 0.0}),
    "dam-regressor": ({"method": "dam-regressor"}, {"prior_weight": 1.0}),
    "flow-gaussian": ({"method": "flow-gaussian"}, {}),
}
"""Name to changes of the avatar's and of the loss's settings; everything else is the same for all."""

ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.1, "patience": None}
"""Fits without curvature, which take many more iterations: what the papers compare."""

LONG_FITS = ("dam", "dam-regressor", "lipflow")
"""Methods whose fits go on to the most iterations: they take most of the study's time."""

PORTRAYED = ("dam", "lipflow", "flow-gaussian")
"""Methods whose random faces are shown."""

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"spatial_bias": False},
    "+spatial bias": {"spatial_bias": True},
    "+warp": {"spatial_bias": False, "warp_field": True},
    "+residual": {"spatial_bias": False, "residual": True},
    "bilinear": {"spatial_bias": False, "upsample": "bilinear"},
}
"""Of the DAM, one switch each against the first; the last one changes the up-sampling alone."""

FLOWS: dict[str, dict[str, Any]] = {
    "gaussian": {"method": "conditional"},
    "affine flow": {"method": "lipflow"},
    "spline flow": {"method": "lipflow", "flow_transform": "spline"},
    "conditional flow": {"method": "lipflow", "flow_conditional": True},
    "whitened gaussian": {"method": "conditional"},
}
"""Densities of frozen codes. The last one sees them in their principal axes: what decorrelation alone is worth."""

WHITENED = "whitened gaussian"
"""Of ``FLOWS``, the one whose codes are rotated."""

AMBIGUOUS: dict[str, Any] = {
    "signals": ("hmc", "keypoints"),
    "headset_views": ("left-eye", "right-eye"),
    "keypoints": ("eye_left_upper", "eye_right_upper", "nose_tip", "lip_corner_left", "lip_corner_right"),
}
"""Signals that leave much open: nothing of the mouth is seen, or five landmarks alone."""


_RENDER = RenderConfig(antialias=True)


@dataclass(frozen=True)
class Study:
    """Sizes of a study.

    Attributes:
        dome: the synthetic capture.
        shard: the shard set.
        seeds: of weights, order of data and samples.
        steps: of the trainings of methods.
        regressor_steps: of the drivers alone that a trained DAM is given.
        variant_steps: of the DAM's variants.
        ambiguous_steps: of the avatars that see ambiguous signals.
        learning_rate: of every training.
        frames_per_batch: of every training.
        views_per_frame: of every training.
        mean_scale: of the encoder's mean.
        log_std_scale: of the encoder's log standard deviation.
        image_weight: of the image terms.
        render: of the trainings.
        dam_latent_weights: lambda_3 of the DAM, of which validation frames choose one; also of what has its prior.
        driven_latent_weights: of LiP-Flow's likelihood, of which they choose one for all methods with driven priors.
        fits: settings of the fits, of which validation frames choose one for each method and signal.
        iterations: of the fits, which are reported.
        short_iterations: how many of them the methods outside ``LONG_FITS`` go, which gain little from more.
        dam_iterations: after which the choices of the methods with prior N(0, I) are judged.
        prior_iterations: after which those of the methods with driven priors are.
        tuning_frames: validation frames on which choices are made.
        test_frames: held-out frames.
        cameras: training cameras whose images are compared.
        density_steps: of the trainings of densities.
        samples: drawn of each prior for the distances between distributions.
    """

    dome: DomeConfig
    shard: ShardConfig
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 1500
    regressor_steps: int = 1000
    variant_steps: int = 800
    ambiguous_steps: int = 800
    learning_rate: float = 4e-3
    frames_per_batch: int = 8
    views_per_frame: int = 1
    mean_scale: float = 1.0
    log_std_scale: float = 0.1
    image_weight: float = 0.05
    render: RenderConfig = _RENDER
    dam_latent_weights: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    driven_latent_weights: tuple[float, ...] = (0.001, 0.01, 0.1)
    fits: tuple[dict[str, float], ...] = (
        {"prior_weight": 0.003},
        {"prior_weight": 0.03},
        {"prior_weight": 0.3},
        {"prior_weight": 3.0},
    )
    iterations: tuple[int, ...] = (0, 10, 20, 50, 200)
    short_iterations: int = 50
    dam_iterations: int = 200
    prior_iterations: int = 20
    tuning_frames: int = 10
    test_frames: int = 40
    cameras: int = 6
    density_steps: int = 400
    samples: int = 320

    def iterations_of(self, method: str) -> tuple[int, ...]:
        """Those of the fits of a method to held-out frames."""
        most = math.inf if method in LONG_FITS else self.short_iterations
        return tuple(count for count in self.iterations if count <= most)


def full_study(face: Path | None) -> Study:
    """320 training frames of 34 cameras, 20 validation frames and 60 held-out ones, of six sentences."""
    splits = SplitConfig(
        # Sentences mix all shapes: held out, they are new mixtures of expressions that were seen.
        test_segments=(
            *("SEN_bright_blue_sails", "SEN_do_boats_float", "SEN_every_warm_loaf"),
            *("SEN_could_you_open_it.2", "SEN_grey_wool_shawl.2", "SEN_how_far_is_rome.2"),
        ),
        val_segments=("SEN_four_shy_foxes", "SEN_a_good_morrow.2"),
        test_camera_count=4,
    )
    return Study(
        dome=_dome(face, segments=40, frames_per_segment=10, image_size_hw=(192, 128)),
        shard=ShardConfig(frames_per_shard=16, splits=splits),
    )


def portrait_study() -> Study:
    """A small one of the procedural head, for pictures where the study itself is of a face that is not to be shown."""
    splits = SplitConfig(test_segments=("SEN_bright_blue_sails",), val_segments=("SEN_a_good_morrow",))
    return Study(
        dome=_dome(None, segments=16, frames_per_segment=10, image_size_hw=(128, 96)),
        shard=ShardConfig(frames_per_shard=16, splits=splits),
        steps=800,
    )


def quick_study(face: Path | None) -> Study:
    """The same in two minutes: it says nothing but that it runs."""
    splits = SplitConfig(
        test_segments=("SEN_bright_blue_sails",), val_segments=("SEN_a_good_morrow",), test_camera_count=2
    )
    return Study(
        dome=_dome(face, segments=8, frames_per_segment=4, image_size_hw=(48, 32), texture_size=64),
        shard=ShardConfig(frames_per_shard=8, splits=splits),
        steps=4,
        regressor_steps=3,
        variant_steps=2,
        ambiguous_steps=3,
        dam_latent_weights=(0.01, 0.1),
        driven_latent_weights=(0.01, 0.1),
        fits=({"prior_weight": 0.3},),
        iterations=(0, 2, 4),
        short_iterations=2,
        dam_iterations=4,
        prior_iterations=2,
        tuning_frames=2,
        test_frames=4,
        cameras=2,
        density_steps=25,
        samples=16,
    )


def _dome(face: Path | None, **sizes: Any) -> DomeConfig:
    if face is None:
        return DomeConfig(cameras=38, **sizes)
    krt = face / "KRT"
    return DomeConfig(face=str(face), krt=str(krt) if krt.is_file() else None, cameras=38, **sizes)
