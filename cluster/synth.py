"""The synthesis job: ``lipflow synth OUT`` writes a synthetic dome capture in the Multiface layout, in parallel.

One Ray task writes a run of frames, one picture at a time. An interrupted job continues where it was: the config is
written first, so that nothing else is mixed in, and the frame list last, so that no reader takes a part for a capture.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.recipe import load_recipe
from cluster.runtime import map_tasks, ray_cluster
from lipflow.errors import ConfigError
from pipeline import storage
from pipeline.dome.scene import dome_scene
from pipeline.dome.writer import (
    DomeConfig,
    finish_dome,
    pending_runs,
    plan_dome,
    write_dome_run,
    write_dome_static,
)

CONFIG_FILE = "driving/dome.json"
"""What the capture is made from, so that a later run knows whether it is the same."""

_DEFAULT = DomeConfig()


@dataclass(frozen=True)
class SynthSummary:
    """What the job did.

    Attributes:
        capture: URI of the capture.
        segments: how many.
        frames: how many.
        views: written in this run.
        written: whether anything was written; False where the capture was complete already.
    """

    capture: str
    segments: int
    frames: int
    views: int
    written: bool


def synthesise(out_uri: str, config: DomeConfig) -> SynthSummary:
    """Write a synthetic capture, one Ray task for a run of frames; nothing if the very same one is there already.

    Raises:
        ConfigError: another capture is there, whole or in part.
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
    if _is_finished(out_uri, config):
        return SynthSummary(out_uri, len(plan.segments), plan.frames, views=0, written=False)
    # First, so that a face or rig that cannot be used is reported before anything is written or started.
    dome_scene(config)
    storage.write_bytes(storage.join(out_uri, CONFIG_FILE), _document(config))
    write_dome_static(config, out_uri)
    with ray_cluster():
        runs = pending_runs(plan, out_uri)
        views = map_tasks(
            write_dome_run,
            [(config, run, out_uri) for run in runs],
            description=f"synthesise, {plan.runs[0].stop} frames a task",
        )
    finish_dome(config, out_uri)
    return SynthSummary(out_uri, len(plan.segments), plan.frames, sum(views), written=True)


def _document(config: DomeConfig) -> bytes:
    return config.model_dump_json().encode()


def _is_finished(out_uri: str, config: DomeConfig) -> bool:
    """Whether the very capture is there; False if nothing or a part of it is.

    Raises:
        ConfigError: something else is there.
    """
    marker = storage.join(out_uri, CONFIG_FILE)
    if storage.exists(marker):
        same = storage.read_bytes(marker) == _document(config)
    else:
        same = not any(storage.exists(storage.join(out_uri, name)) for name in ("KRT", "images", "frame_list.txt"))
    if not same:
        raise ConfigError(
            f"{out_uri} holds another capture, or a part of one made with other settings: "
            "choose another OUT, or remove it"
        )
    return storage.exists(storage.join(out_uri, "frame_list.txt"))


def _image_size_hw(text: str) -> list[int]:
    """(height, width) from ``"2048x1334"``.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise ConfigError(f"--image-size {text}: expected HEIGHTxWIDTH in pixels, such as 2048x1334")
    return [int(edge) for edge in match.groups()]


def synth_command(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the capture goes: path, file:// or s3:// URI.")],
    cameras: Annotated[
        int | None, typer.Option(help=f"Number of dome cameras ({_DEFAULT.cameras}); not with --krt.")
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Of the dome's images, pixels (128x96), such as 2048x1334."),
    ] = None,
    texture_size: Annotated[
        int | None, typer.Option(help=f"Edge of the average textures, texels ({_DEFAULT.texture_size}).")
    ] = None,
    segments: Annotated[
        int | None, typer.Option(help=f"Number of expression and sentence segments ({_DEFAULT.segments}).")
    ] = None,
    frames_per_segment: Annotated[
        int | None, typer.Option(help=f"Number of frames in each segment ({_DEFAULT.frames_per_segment}).")
    ] = None,
    missing: Annotated[
        float | None, typer.Option(help="Share of the views to leave out, 0 to below 1, such as 0.01.")
    ] = None,
    face: Annotated[str | None, typer.Option(metavar="DIR", help="Real face asset; default: procedural.")] = None,
    krt: Annotated[
        str | None, typer.Option(metavar="FILE", help="Calibration of a rig (millimetres); default: a generated arc.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random, from 0.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic dome capture in the Multiface layout; run again to continue what was interrupted."""
    given: dict[str, Any] = {
        "cameras": cameras,
        "image_size_hw": None if image_size is None else _image_size_hw(image_size),
        "texture_size": texture_size,
        "segments": segments,
        "frames_per_segment": frames_per_segment,
        "missing_fraction": missing,
        "face": face,
        "krt": krt,
        "seed": seed,
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    config = load_recipe(DomeConfig, recipe, [*overrides, *(set_ or ())])
    if cameras is not None and config.krt is not None:
        raise ConfigError(f"--cameras {cameras} does not go with the rig of {config.krt}: leave one of them out")
    summary = synthesise(out, config)
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.capture}: {summary.segments} segments, {summary.frames} frames, "
        + (f"{summary.views} views written" if summary.written else "complete already, nothing written"),
    )


if __name__ == "__main__":
    command.run_job("cluster.synth", "synth_command")
