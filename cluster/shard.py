"""The sharding job: ``lipflow shard CAPTURE OUT`` writes a capture as WebDataset shards with a manifest.

Each shard is one idempotent Ray task; the manifest is the commit. A second run writes only what is missing, and
nothing at all where the set is complete.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.runtime import map_tasks, ray_cluster
from cluster.tracking import TrackingConfig, initialise, tracked_run
from lipflow.config import StrictConfig
from pipeline import storage
from pipeline.manifest import Manifest, ShardRecord
from pipeline.shards import (
    MAX_LISTED_FAULTS,
    CorruptFilesError,
    ShardConfig,
    ShardTask,
    commit,
    find_committed,
    open_for_sharding,
    plan_shards,
    reduce_statistics,
    shard_statistics,
    write_shard,
)
from pipeline.splits import with_split_files
from pipeline.stats import FrameSums


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
        digest: of the set.
        frames: split -> number of frames.
        cameras: number of cameras, of which ``held_out_cameras`` are not for training.
        held_out_cameras: their ids.
        missing_views: views that the capture lacks.
        skipped_files: files that could not be used, under ``on_error: skip``.
        size_bytes: of all shards.
        written: whether anything was written; False where the set was complete already.
    """

    shards: str
    digest: str
    frames: dict[str, int]
    cameras: int
    held_out_cameras: tuple[str, ...]
    missing_views: int
    skipped_files: int
    size_bytes: int
    written: bool


def shard(capture_uri: str, out_uri: str, recipe: ShardRecipe) -> ShardSummary:
    """Write the shard set of a capture.

    Raises:
        CaptureError: no capture at ``capture_uri``.
        CorruptFilesError: corrupt files under ``on_error: fail``; it names them all. The other shards are kept, so
            that a second run writes only what is missing.
        ConfigError: the recipe does not fit the capture.
        StorageError: ``out_uri`` cannot be written.
    """
    config = recipe.shard.model_copy(update={"splits": with_split_files(recipe.shard.splits)})
    capture, out_uri = open_for_sharding(capture_uri, config), storage.normalize_uri(out_uri)
    storage.check_writable(out_uri)
    plan = plan_shards(capture, config)
    done = find_committed(out_uri, plan)
    if done is not None:
        return _summary(out_uri, done, written=False)
    initialise(recipe.tracking)
    with (
        tracked_run("shard", f"shard {out_uri.rsplit('/', 1)[-1]}", config=recipe.tracking, recipe=recipe) as run,
        ray_cluster(),
    ):
        results = map_tasks(
            _write_and_sum,
            [(capture.uri, config, task, out_uri) for task in plan.shards],
            description="shard",
            stop_when=_TooManyFaults(),
        )
        faults = [item for result in results if isinstance(result, CorruptFilesError) for item in result.files]
        if faults:
            raise CorruptFilesError(capture.uri, tuple(faults))
        records, sums = [record for record, _ in results], [part for _, part in results]
        normalization = reduce_statistics(out_uri, capture, config, sums)
        manifest = commit(out_uri, capture, config, plan, records, normalization)
        summary = _summary(out_uri, manifest, written=True)
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


def _write_and_sum(
    capture_uri: str, config: ShardConfig, task: ShardTask, out_uri: str
) -> tuple[ShardRecord, FrameSums | None] | CorruptFilesError:
    """The record and the statistics of a shard; corrupt files are a result, so that the other shards go on."""
    try:
        record = write_shard(capture_uri, config, task, out_uri)
    except CorruptFilesError as error:
        return error
    if task.split != "train" or config.statistics != "recompute":
        return record, None
    return record, shard_statistics(out_uri, record)


class _TooManyFaults:
    """Whether so many corrupt files were found that looking for more is not worth the time."""

    def __init__(self) -> None:
        self._found = 0

    def __call__(self, result: object) -> bool:
        self._found += len(result.files) if isinstance(result, CorruptFilesError) else 0
        return self._found > MAX_LISTED_FAULTS


def _summary(out_uri: str, manifest: Manifest, *, written: bool) -> ShardSummary:
    frames: dict[str, int] = {}
    for record in manifest.shards:
        frames[record.split] = frames.get(record.split, 0) + len(record.samples)
    return ShardSummary(
        shards=out_uri,
        digest=manifest.digest,
        frames=frames,
        cameras=len(manifest.cameras),
        held_out_cameras=manifest.test_camera_ids,
        missing_views=sum(1 for _ in manifest.missing_views()),
        skipped_files=len(manifest.skipped()),
        size_bytes=sum(record.size_bytes for record in manifest.shards),
        written=written,
    )


def shard_command(
    capture: Annotated[str, typer.Argument(metavar="CAPTURE", help="Capture: path, file:// or s3:// URI.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the shard set goes.")],
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a capture as WebDataset shards; run again to write only what is missing."""
    summary = shard(capture, out, load_recipe(ShardRecipe, recipe, set_ or ()))
    frames = ", ".join(f"{count} {split}" for split, count in summary.frames.items())
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.shards}: {frames} frames, {summary.cameras} cameras ({len(summary.held_out_cameras)} held out), "
        f"{summary.missing_views} views missing, {summary.skipped_files} files skipped, "
        f"{summary.size_bytes / 1e6:.1f} MB" + ("" if summary.written else "; complete already, nothing written"),
    )


if __name__ == "__main__":
    command.run(shard_command)
