"""The sharding job: ``lipflow shard CAPTURE [CAPTURE ...] OUT`` writes captures as WebDataset shards with a manifest.

Each shard is one idempotent Ray task; the manifest is the commit. A second run keeps every shard that is there with
the right digest and writes only what is missing, and nothing at all where the set is complete. Jobs of the same plan
may run at the same time; a job of another one is refused (:mod:`pipeline.sharding.target`).
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.records.tracking import TrackingConfig, initialise, tracked_run
from cluster.runtime import map_tasks, ray_cluster
from lipflow.config import StrictConfig
from pipeline import storage
from pipeline.corrupt_files import CorruptFilesError, FaultLimit
from pipeline.manifest import Manifest, ShardRecord, SkippedFile
from pipeline.sharding.costs import FrameCost, probe_frames
from pipeline.sharding.shards import (
    FETCH_OR_SKIP,
    ShardConfig,
    ShardOutcome,
    ShardPlan,
    ShardTask,
    StoredCapture,
    commit,
    find_committed,
    finish_shard,
    named_captures,
    plan_shards,
    reduce_statistics,
)
from pipeline.sharding.sources import CapturePlace
from pipeline.sharding.splits import with_split_files
from pipeline.sharding.stats import OrderedSums
from pipeline.sharding.target import check_target, claimed, count_present, remove_leftovers


class ShardRecipe(StrictConfig):
    """Settings of the sharding job.

    Attributes:
        shard: what the set holds and how.
        tracking: where MLflow keeps the run.
    """

    shard: ShardConfig = ShardConfig()
    tracking: TrackingConfig = TrackingConfig()


@dataclass(frozen=True)
class ShardSummary:
    """What the job did.

    Attributes:
        shards: URI of the set.
        captures: the URIs of its captures, in the order of their names.
        digest: of the set.
        frames: split -> number of frames.
        cameras: number of cameras, of which ``held_out_cameras`` are not for training.
        held_out_cameras: their ids.
        missing_views: views that the capture lacks.
        skipped_files: files that could not be used, under ``on_error: skip``.
        size_bytes: of all shards.
        written: whether anything was written; False where the set was complete already.
        shards_kept: shards that were there already.
        shards_written: shards that this run has written.
    """

    shards: str
    captures: tuple[str, ...]
    digest: str
    frames: dict[str, int]
    cameras: int
    held_out_cameras: tuple[str, ...]
    missing_views: int
    skipped_files: int
    size_bytes: int
    written: bool
    shards_kept: int
    shards_written: int


@dataclass(frozen=True)
class ShardForecast:
    """What the job would do. Sizes and times follow from a few frames that were encoded for it.

    Attributes:
        shards: URI of the set.
        captures: the URIs of its captures, in the order of their names.
        shards_planned: their number.
        shards_present: of these, already there by name; their digests are compared when the job runs.
        frames: split -> number of frames.
        frames_per_shard: the most that one holds.
        cameras: number of cameras, of which ``held_out_cameras`` are not for training.
        held_out_cameras: their ids.
        frame_bytes: mean size of a frame with all its views; None if no frame could be probed, as those below.
        size_bytes: of all shards.
        cpu_hours: time of one core like this machine's to read, resize and encode all frames.
    """

    shards: str
    captures: tuple[str, ...]
    shards_planned: int
    shards_present: int
    frames: dict[str, int]
    frames_per_shard: int
    cameras: int
    held_out_cameras: tuple[str, ...]
    frame_bytes: int | None
    size_bytes: int | None
    cpu_hours: float | None


def shard(captures: str | Sequence[str], out_uri: str, recipe: ShardRecipe) -> ShardSummary:
    """Write the shard set of a capture, or of several.

    Args:
        captures: a URI, or several, each a ``URI`` or ``NAME=URI``; their order does not matter.
        out_uri: the folder of the set.
        recipe: what it holds and how.

    Raises:
        CaptureError: there is no such capture.
        CorruptFilesError: corrupt files under ``on_error: fail``; it names them all. The other shards are kept, so
            that a second run writes only what is missing.
        ConfigError: the recipe does not fit the captures, these cannot be in one set, or something of another plan is
            at ``out_uri``.
        StorageError: ``out_uri`` cannot be written.
    """
    plan, out_uri = _planned(captures, out_uri, recipe)
    done = find_committed(out_uri, plan)
    if done is not None:
        remove_leftovers(out_uri, plan.fingerprint)
        return _summary(out_uri, done, written=False, shards_kept=len(done.shards))
    names = [task.name for task in plan.shards]
    with claimed(out_uri, plan.fingerprint, names):
        initialise(recipe.tracking)
        with (
            tracked_run("shard", f"shard {out_uri.rsplit('/', 1)[-1]}", config=recipe.tracking, recipe=recipe) as run,
            ray_cluster(),
        ):
            progress, limit, job_id = _Progress(plan), FaultLimit(), uuid.uuid4().hex
            places = {stored.name: stored.place for stored in plan.sources.captures}
            results = map_tasks(
                _finish_shard,
                [(job_id, places[task.capture_name], plan.config, task, out_uri) for task in plan.shards],
                description="shard",
                stop_when=lambda result: limit.is_passed_by(len(_faults(result))),
                receive=progress.receive,
                note=progress.note,
            )
            faults = [item for result in results for item in _faults(result)]
            if faults:
                raise CorruptFilesError(plan.sources.uri, tuple(faults), FETCH_OR_SKIP)
            normalization = reduce_statistics(plan, [progress.sums.total()])
            manifest = commit(out_uri, plan, results, normalization)
            summary = _summary(out_uri, manifest, written=True, shards_kept=progress.shards_kept)
            run.set_tags({"lipflow.shards_digest": summary.digest, "lipflow.shards": out_uri})
            run.log_metrics(
                {
                    "frames": sum(summary.frames.values()),
                    "size_bytes": summary.size_bytes,
                    "missing_views": summary.missing_views,
                    "skipped_files": summary.skipped_files,
                }
            )
    return summary


def forecast(captures: str | Sequence[str], out_uri: str, recipe: ShardRecipe) -> ShardForecast:
    """What :func:`shard` would do with the same arguments; nothing is written.

    Raises:
        LipflowError: as :func:`shard`, as far as that can be told beforehand.
    """
    plan, out_uri = _planned(captures, out_uri, recipe)
    names = [task.name for task in plan.shards]
    check_target(out_uri, plan.fingerprint, names)
    frames = Counter[str]()
    for task in plan.shards:
        frames[task.split] += len(task.frames)
    cost = _whole_cost(plan)
    return ShardForecast(
        shards=out_uri,
        captures=tuple(stored.capture.uri for stored in plan.sources.captures),
        shards_planned=len(names),
        shards_present=count_present(out_uri, names),
        frames=dict(frames),
        frames_per_shard=max(len(task.frames) for task in plan.shards),
        cameras=len(plan.sources.cameras),
        held_out_cameras=plan.sources.test_camera_ids,
        frame_bytes=None if cost is None else round(cost.size_bytes / frames.total()),
        size_bytes=None if cost is None else round(cost.size_bytes),
        cpu_hours=None if cost is None else cost.cpu_s / 3600,
    )


def _whole_cost(plan: ShardPlan) -> FrameCost | None:
    """Of all frames, from a few of each capture; None if one has none that can be probed."""
    size_bytes = cpu_s = 0.0
    for stored in plan.sources.captures:
        frames = [frame for task in plan.shards if task.capture_name == stored.name for frame in task.frames]
        cost = probe_frames(stored.capture, stored.settings, frames)
        if cost is None:
            return None
        size_bytes, cpu_s = size_bytes + cost.size_bytes * len(frames), cpu_s + cost.cpu_s * len(frames)
    return FrameCost(size_bytes, cpu_s)


def _planned(captures: str | Sequence[str], out_uri: str, recipe: ShardRecipe) -> tuple[ShardPlan, str]:
    config = recipe.shard.model_copy(update={"splits": with_split_files(recipe.shard.splits)})
    named = captures if isinstance(captures, str) else named_captures(captures)
    return plan_shards(named, config), storage.normalize_uri(out_uri)


@lru_cache(maxsize=1)
def _capture_of(job_id: str, place: CapturePlace) -> StoredCapture:
    """The open capture, once for all shards that a worker writes for a job: its listing takes a while on S3."""
    return place.open()


def _finish_shard(
    job_id: str, place: CapturePlace, config: ShardConfig, task: ShardTask, out_uri: str
) -> ShardOutcome | CorruptFilesError:
    """Corrupt files are a result, so that the other shards go on."""
    try:
        return finish_shard(_capture_of(job_id, place), config, task, out_uri)
    except CorruptFilesError as error:
        return error


def _faults(result: object) -> tuple[SkippedFile, ...]:
    return result.files if isinstance(result, CorruptFilesError) else ()


class _Progress:
    """Takes the outcomes as they come: keeps records, adds statistics, and tells how fast shards are written."""

    def __init__(self, plan: ShardPlan):
        self.sums = OrderedSums(task.name for task in plan.shards)
        self.shards_kept = 0
        self._remaining_frames = sum(len(task.frames) for task in plan.shards)
        self._frames = self._bytes = 0
        self._started_s = time.monotonic()

    def receive(self, result: ShardOutcome | CorruptFilesError) -> ShardRecord | CorruptFilesError:
        """The record alone; statistics of all shards would not fit into memory."""
        if isinstance(result, CorruptFilesError):
            return result
        record = result.record
        self.sums.add(record.name, result.sums)
        self._remaining_frames -= len(record.samples)
        if result.kept:
            self.shards_kept += 1
        else:
            self._frames += len(record.samples)
            self._bytes += record.size_bytes
        return record

    def note(self) -> str:
        """Kept shards, rates of the written ones, and the time that the remaining frames take at that rate."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-6)
        kept = f"{self.shards_kept} kept, " if self.shards_kept else ""
        if not self._frames:
            return kept + "none written yet"
        rate = self._frames / elapsed_s
        left = timedelta(seconds=round(max(self._remaining_frames, 0) / rate))
        return f"{kept}{rate:.1f} frames/s, {self._bytes / elapsed_s / 1e6:.1f} MB/s, {left} left"


def _summary(out_uri: str, manifest: Manifest, *, written: bool, shards_kept: int) -> ShardSummary:
    frames: dict[str, int] = {}
    for record in manifest.shards:
        frames[record.split] = frames.get(record.split, 0) + len(record.samples)
    return ShardSummary(
        shards=out_uri,
        captures=tuple(capture.uri for capture in manifest.captures),
        digest=manifest.digest,
        frames=frames,
        cameras=len(manifest.cameras),
        held_out_cameras=manifest.test_camera_ids,
        missing_views=sum(1 for _ in manifest.missing_views()),
        skipped_files=len(manifest.skipped()),
        size_bytes=sum(record.size_bytes for record in manifest.shards),
        written=written,
        shards_kept=shards_kept,
        shards_written=len(manifest.shards) - shards_kept,
    )


def shard_command(
    captures: Annotated[
        list[str],
        typer.Argument(
            metavar="CAPTURE",
            help="Captures: path, file:// or s3:// URI. Several are one set; each is called as its address ends, or "
            "NAME=URI.",
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="Where the shard set goes. Shards that are there with the right digest are kept: run again to resume.",
        ),
    ],
    recipe: RecipeOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, its size and its cost; write nothing.")
    ] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a capture, or several, as WebDataset shards.

    Run the same command again to resume: shards that are there with the right digest are kept, the rest is written.
    OUT belongs to its captures and recipe; with others it is refused, unless it is empty. Of several captures, a
    segment is SEGMENT@CAPTURE, cameras are the same where their ids are, and each capture keeps its calibration.
    """
    settings = load_recipe(ShardRecipe, recipe, set_ or ())
    if dry_run:
        planned = forecast(captures, out, settings)
        command.emit(asdict(planned), as_json, _forecast_line(planned))
        return
    summary = shard(captures, out, settings)
    frames = ", ".join(f"{count} {split}" for split, count in summary.frames.items())
    done = f"; {summary.shards_written} shards written, {summary.shards_kept} kept"
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.shards}: {_of_captures(summary.captures)}{frames} frames, {summary.cameras} cameras "
        f"({len(summary.held_out_cameras)} held out), "
        f"{summary.missing_views} views missing, {summary.skipped_files} files skipped, "
        f"{summary.size_bytes / 1e6:.1f} MB" + (done if summary.written else "; complete already, nothing written"),
    )


def _of_captures(captures: Sequence[str]) -> str:
    return f"{len(captures)} captures, " if len(captures) > 1 else ""


def _forecast_line(planned: ShardForecast) -> str:
    frames = ", ".join(f"{count} {split}" for split, count in planned.frames.items())
    held_out = f" ({', '.join(planned.held_out_cameras)} held out)" if planned.held_out_cameras else ""
    cost = "no frame could be probed"
    if planned.size_bytes is not None and planned.frame_bytes is not None and planned.cpu_hours is not None:
        cost = (
            f"about {planned.size_bytes / 1e6:.1f} MB ({planned.frame_bytes / 1e6:.2f} MB a frame) and "
            f"{planned.cpu_hours:.3g} CPU-hours"
        )
    return (
        f"{planned.shards}: {planned.shards_planned} shards of up to {planned.frames_per_shard} frames "
        f"({planned.shards_present} there already), {_of_captures(planned.captures)}{frames} frames, "
        f"{planned.cameras} cameras{held_out}, {cost}; "
        "nothing written"
    )


if __name__ == "__main__":
    command.run_job("cluster.shard", "shard_command")
