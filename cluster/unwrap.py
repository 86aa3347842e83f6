"""The unwrapping job: ``lipflow unwrap CAPTURE [OUT]`` makes the textures that a capture lacks from its images.

Runs of frames are idempotent Ray tasks. Files that are there are never written again, so a second run writes only
what is missing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.runtime import map_tasks, ray_cluster
from pipeline import storage
from pipeline.captures.opening import open_capture
from pipeline.corrupt_files import FaultLimit
from pipeline.unwrapping import (
    UnwrapConfig,
    UnwrapReport,
    plan_unwrapping,
    require_usable,
    unwrap_frames,
    write_settings,
)


@dataclass(frozen=True)
class UnwrapSummary:
    """What the job did.

    Attributes:
        capture: URI of the capture.
        out: URI of the folder that holds the textures.
        texture_size: texels along one side.
        cameras: those that were unwrapped.
        averages: average textures written in this run.
        views: textures of single cameras written in this run.
        kept: average textures that were there already.
        seen_fraction: mean over the averages written, of the part of the atlas that a camera saw; None if none was.
        missing_views: images that the capture lacks, of the frames of this run.
        unseen_frames: frames without any image, which have no texture.
    """

    capture: str
    out: str
    texture_size: int
    cameras: tuple[str, ...]
    averages: int
    views: int
    kept: int
    seen_fraction: float | None
    missing_views: int
    unseen_frames: tuple[str, ...]


def unwrap(capture_uri: str, config: UnwrapConfig, out_uri: str | None = None) -> UnwrapSummary:
    """Write the textures that are absent.

    Args:
        capture_uri: the capture.
        config: what is unwrapped, and how.
        out_uri: where the textures go; None: into the capture itself.

    Raises:
        CaptureError: no capture at ``capture_uri``, or corrupt files in it: all are named, after all else is written.
        ConfigError: the configuration does not fit the capture, or what lies at ``out_uri``.
        StorageError: ``out_uri`` cannot be written.
    """
    capture = open_capture(capture_uri)
    plan = plan_unwrapping(capture, config, out_uri)
    report = UnwrapReport()
    if plan.tasks:
        storage.check_writable(plan.out_uri)
        write_settings(plan)
        limit = FaultLimit()
        with ray_cluster():
            parts = map_tasks(
                unwrap_frames,
                [(capture.uri, plan.settings, segment, frames, plan.out_uri) for segment, frames in plan.tasks],
                description="unwrap",
                stop_when=lambda part: limit.is_passed_by(len(part.unusable)),
            )
        report = UnwrapReport.total(part for part in parts if part is not None)
    require_usable(capture.uri, report.unusable)
    return UnwrapSummary(
        capture=capture.uri,
        out=plan.out_uri,
        texture_size=plan.settings.texture_size,
        cameras=plan.settings.camera_ids,
        averages=report.averages,
        views=report.views,
        kept=plan.kept,
        seen_fraction=fmean(report.seen_fractions) if report.seen_fractions else None,
        missing_views=report.missing_views,
        unseen_frames=report.unseen_frames,
    )


def unwrap_command(
    capture: Annotated[str, typer.Argument(metavar="CAPTURE", help="Capture: path, file:// or s3:// URI.")],
    out: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="Where the textures go; default: into the capture.")
    ] = None,
    texture_size: Annotated[
        int | None, typer.Option(help="Texels along one side; default: the capture's own, else 1024.")
    ] = None,
    cameras: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Cameras to unwrap; repeatable, default all. Leave out those that are held out for evaluation: the "
            "average would show their images to the model.",
        ),
    ] = None,
    views: Annotated[
        bool | None, typer.Option("--views/--no-views", help="Write each camera's own texture, too. Default: no.")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the textures that a capture lacks from its images; run again to write only what is missing."""
    given = {"texture_size": texture_size, "views": views, "cameras": cameras or None}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    summary = unwrap(capture, load_recipe(UnwrapConfig, recipe, [*overrides, *(set_ or ())]), out)
    seen = "" if summary.seen_fraction is None else f", {summary.seen_fraction:.1%} of the atlas seen on average"
    unseen = f", {len(summary.unseen_frames)} frames without any image" if summary.unseen_frames else ""
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.out}: {summary.averages} average textures and {summary.views} of single cameras written from "
        f"{len(summary.cameras)} cameras, {summary.kept} averages were there{seen}, "
        f"{summary.missing_views} views missing{unseen}",
    )


if __name__ == "__main__":
    command.run_job("cluster.unwrap", "unwrap_command")
