"""What the tasks of the science study compute, each in one process of one core.

Folders under the scratch folder: ``capture`` and ``shards`` of a data set's name, ``avatars/NAME`` of a training's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from science_density import density
from science_samples import prior_samples, uncertainty

from cluster.scores.scoring import calibrate_colors, score_fits, score_reconstructions
from cluster.training.loop import STATISTICS_FRAMES, untrained_avatar
from cluster.training.micro_batches import batches_from, seed_of
from cluster.training.objective import Objective
from cluster.training.optimisation import descend, parameter_groups, set_learning_rate
from cluster.training.recipe import TrainRecipe
from lipflow.checkpoint import save_avatar
from lipflow.config import FitConfig, RenderConfig
from lipflow.render.renderer import Renderer
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, finish_dome, pending_runs, plan_dome, write_dome_run, write_dome_static
from pipeline.loading.loader import ShardLoader, ShardSet
from pipeline.sharding.shards import ShardConfig, write_shards
from pipeline.sharding.splits import spread

Settings = dict[str, Any]


def dome(scratch: Path, name: str, settings: Settings) -> dict[str, int]:
    """One share of a dome's frames: ``part`` of ``parts`` of its runs."""
    del name
    config, out = DomeConfig.model_validate(settings["dome"]), str(scratch / settings["data"] / "capture")
    if settings["part"] == 0:
        write_dome_static(config, out)
    runs = plan_dome(config).runs[settings["part"] :: settings["parts"]]
    pending = pending_runs(plan_dome(config), out)
    return {"views": sum(write_dome_run(config, run, out) for run in runs if run in pending)}


def shards(scratch: Path, name: str, settings: Settings) -> dict[str, Any]:
    """The shard set of a dome whose shares are all written."""
    del name
    folder = scratch / settings["data"]
    if not (folder / "capture" / "frame_list.txt").is_file():
        finish_dome(DomeConfig.model_validate(settings["dome"]), str(folder / "capture"))
    config = ShardConfig.model_validate(settings["shard"])
    write_shards(open_capture(str(folder / "capture")), config, str(folder / "shards"))
    opened = ShardSet.open(str(folder / "shards"))
    frames = {split: opened.frame_ids(split) for split in ("train", "val", "test")}
    return {
        "frames": frames,
        "train_cameras": list(opened.train_camera_ids),
        "test_cameras": list(opened.test_camera_ids),
        "frontal_camera": opened.frontal_camera_id,
        "digest": opened.digest,
    }


def train(scratch: Path, name: str, settings: Settings) -> dict[str, Any]:
    """One avatar, by the very loop of the train job without its cluster, checkpoints and tracking."""
    recipe = TrainRecipe.model_validate(settings["recipe"])
    opened = ShardSet.open(str(scratch / settings["data"] / "shards"))
    avatar = untrained_avatar(opened, recipe, str(scratch / recipe.model) if recipe.model else None)
    render = recipe.render
    renderer = Renderer(opened.topology, render.backend, filter=render.filter, antialias=render.antialias)
    measured = spread(opened.frame_ids("train"), STATISTICS_FRAMES)
    driving = opened.frames(measured, opened.train_camera_ids[:1]).driving
    avatar.measure_driving(driving, recipe.add_drivers or avatar.signals)
    objective = Objective(avatar, renderer, recipe.loss, recipe.add_drivers)
    loader = ShardLoader(opened, "train", opened.train_camera_ids, recipe.loader)
    optimizer = torch.optim.Adam(parameter_groups(avatar, recipe), fused=True)
    generator, batches, trace = torch.Generator(), batches_from(loader, 0), []
    for step in range(recipe.steps):
        batch = next(batches)
        generator.manual_seed(seed_of(recipe.seed, step, 0))
        set_learning_rate(optimizer, step, recipe)
        losses = objective(batch, generator)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        descend(optimizer, recipe.gradient_clip_norm, step, batch.frame_ids)
        if (step + 1) % recipe.log_every_steps == 0:
            reported = losses.terms | losses.diagnostics
            trace.append({"step": step + 1} | {key: value.item() for key, value in reported.items()})
    cameras = spread(opened.train_camera_ids, recipe.validation_cameras)
    held = [opened.frames([frame], cameras) for frame in spread(opened.frame_ids("val"), recipe.validation_frames)]
    total, frames = objective.validate(held)
    save_avatar(avatar, scratch / "avatars" / name)
    views = recipe.steps * recipe.loader.frames_per_batch * recipe.loader.views_per_frame
    return {"validation_loss": total / frames, "views": views, "trace": trace}


def fits(scratch: Path, name: str, settings: Settings) -> list[dict[str, Any]]:
    """Rows of frames driven by one signal, before the fit and after each of ``iterations``."""
    del name
    rows = []
    for start in range(0, len(settings["frames"]), settings["frames_at_once"]):
        scored = score_fits(
            str(scratch / "avatars" / settings["avatar"]),
            str(scratch / settings["data"] / "shards"),
            RenderConfig(),
            settings["frames"][start : start + settings["frames_at_once"]],
            settings["cameras"],
            settings["signal"],
            FitConfig.model_validate(settings["fit"] | {"iterations": max(settings["iterations"])}),
            settings["iterations"],
        )
        rows += [asdict(score) for score in scored.scores]
    return rows


def reconstructions(scratch: Path, name: str, settings: Settings) -> list[dict[str, Any]]:
    """Rows of the encoder's reconstructions on training and held-out cameras, and of the mean face."""
    del name
    place = (str(scratch / "avatars" / settings["avatar"]), str(scratch / settings["data"] / "shards"), RenderConfig())
    calibration = settings["calibration_frames"]
    colors = calibrate_colors(*place, calibration) if calibration else {}
    cameras = settings["cameras"], settings["held_out_cameras"]
    scored = score_reconstructions(*place, settings["frames"], *cameras, colors)
    return [asdict(score) for score in scored.scores]


KINDS: dict[str, Callable[[Path, str, Settings], Any]] = {
    "density": density,
    "dome": dome,
    "fits": fits,
    "prior_samples": prior_samples,
    "reconstructions": reconstructions,
    "shards": shards,
    "train": train,
    "uncertainty": uncertainty,
}
