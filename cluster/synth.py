"""The synthesis job: ``lipflow synth OUT`` writes a synthetic dome capture in the Multiface layout, in parallel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.runtime import map_tasks, ray_cluster
from lipflow.errors import ConfigError
from pipeline import storage
from pipeline.captures.dome import DomeConfig, finish_dome, plan_dome, write_dome_segment, write_dome_static

CONFIG_FILE = "driving/dome.json"
"""What the capture was made from, so that a second run knows whether it is the same."""


@dataclass(frozen=True)
class SynthSummary:
    """What the job did.

    Attributes:
        capture: URI of the capture.
        segments: how many.
        frames: how many.
        views: written in this run; 0 where the capture was complete already.
    """

    capture: str
    segments: int
    frames: int
    views: int


def synthesise(out_uri: str, config: DomeConfig) -> SynthSummary:
    """Write a synthetic capture, one Ray task a segment; nothing if the very same one is there already.

    Raises:
        ConfigError: another capture is there.
        CaptureError: the face or the KRT file cannot be used.
        StorageError: ``out_uri`` cannot be written.
    """
    out_uri = storage.normalize_uri(out_uri)
    # Workers may run in another folder.
    config = config.model_copy(
        update={name: str(Path(path).absolute()) for name in ("face", "krt") if (path := getattr(config, name))}
    )
    storage.check_writable(out_uri)
    plan = plan_dome(config)
    marker = storage.join(out_uri, CONFIG_FILE)
    document = config.model_dump_json().encode()
    finished = storage.exists(storage.join(out_uri, "frame_list.txt"))
    if finished:
        if not storage.exists(marker) or storage.read_bytes(marker) != document:
            raise ConfigError(f"{out_uri} holds another capture: choose another OUT, or remove it")
        return SynthSummary(out_uri, len(plan.segments), plan.frames, 0)
    with ray_cluster():
        # First, so that a face or rig that cannot be used is reported before any task starts.
        write_dome_static(config, out_uri)
        views = map_tasks(
            write_dome_segment, [(config, segment, out_uri) for segment in plan.segments], description="synthesise"
        )
        storage.write_bytes(marker, document)
        finish_dome(config, out_uri)
    return SynthSummary(out_uri, len(plan.segments), plan.frames, sum(views))


def synth_command(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the capture goes.")],
    cameras: Annotated[int | None, typer.Option(help="Dome cameras.")] = None,
    segments: Annotated[int | None, typer.Option(help="Expression and sentence segments.")] = None,
    frames_per_segment: Annotated[int | None, typer.Option(help="Frames in each.")] = None,
    face: Annotated[str | None, typer.Option(metavar="DIR", help="Real face asset; default: procedural.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic dome capture in the Multiface layout."""
    given = {
        "cameras": cameras,
        "segments": segments,
        "frames_per_segment": frames_per_segment,
        "face": face,
        "seed": seed,
    }
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    summary = synthesise(out, load_recipe(DomeConfig, recipe, [*overrides, *(set_ or ())]))
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.capture}: {summary.segments} segments, {summary.frames} frames, "
        + (f"{summary.views} views written" if summary.views else "complete already, nothing written"),
    )


if __name__ == "__main__":
    command.run(synth_command)
