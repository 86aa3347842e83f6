"""The demonstration: ``lipflow demo`` runs every job on a small synthetic dome, in minutes, on two cores.

Capture, shards, a DAM and a LiP-Flow avatar, their evaluations, a registered champion, and a report. Whatever is
finished is not done again: a second run reuses the capture, the shards and the trained avatars; remove the output
folder to start over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.evaluate import EvaluateRecipe, evaluate
from cluster.promote import PromoteRecipe, promote_model
from cluster.recipe import load_recipe
from cluster.records.tracking import TrackingConfig
from cluster.reports.demo_report import DemoOutcome, driven_side_by_side, headline_rows, report_content
from cluster.reports.page import HeadlineRow, print_table, render_report
from cluster.runtime import ray_cluster
from cluster.scores.evaluation import png_bytes
from cluster.shard import ShardRecipe, shard
from cluster.synth import synthesise
from cluster.train import TrainRecipe, train
from lipflow.config import AvatarConfig, FitConfig, LossConfig, RenderConfig, StrictConfig
from lipflow.errors import ConfigError
from lipflow.types import DRIVING_SIGNALS
from pipeline import storage
from pipeline.dome.writer import DomeConfig
from pipeline.loading.loader import LoaderConfig
from pipeline.sharding.shards import ShardConfig
from pipeline.sharding.splits import SplitConfig

METHODS = ("dam", "lipflow")


def _training(method: Literal["dam", "lipflow"], steps: int) -> TrainRecipe:
    """A few minutes' worth of training: narrow layers, and terms and rates that get far in few steps.

    The dome's textures change by two or three grey levels from frame to frame, so an image error in units of their
    std is large: ``image_weight`` brings it to the size of the geometry term. The paper's small ``mean_scale`` and
    ``log_std_scale`` would leave the posterior's std near 1 for thousands of steps.
    """
    return TrainRecipe(
        avatar=AvatarConfig.small(method=method, texture_size=128, mean_scale=1.0, log_std_scale=0.1),
        loss=LossConfig(image_weight=0.05),
        render=RenderConfig(antialias=True),
        loader=LoaderConfig(frames_per_batch=4, views_per_frame=2, signals=() if method == "dam" else DRIVING_SIGNALS),
        steps=steps,
        learning_rate=4e-3,
        checkpoint_every_steps=140,
    )


class DemoRecipe(StrictConfig):
    """Settings of all the demo's jobs.

    Attributes:
        dome: the synthetic capture.
        shard: the shard set.
        dam: training of the baseline, a Deep Appearance Model.
        lipflow: training of LiP-Flow.
        evaluate_dam: its fits start at z = 0, far away, and get more iterations.
        evaluate_lipflow: its fits start at the prior's mean.
        tracking: where MLflow keeps all runs; by default beside the output.
    """

    dome: DomeConfig = DomeConfig(segments=15, frames_per_segment=8)
    shard: ShardConfig = ShardConfig(
        frames_per_shard=8,
        splits=SplitConfig(
            # Sentences mix all shapes: held out, they are new mixtures of expressions that were seen.
            test_segments=("SEN_do_boats_float", "SEN_every_warm_loaf"),
            val_segments=("SEN_four_shy_foxes",),
        ),
    )
    dam: TrainRecipe = _training("dam", 260)
    lipflow: TrainRecipe = _training("lipflow", 280)
    evaluate_dam: EvaluateRecipe = EvaluateRecipe(
        fit=FitConfig(iterations=50, prior_weight=0.03),
        max_frames=12,
        max_cameras=8,
        picture_frames=3,
    )
    evaluate_lipflow: EvaluateRecipe = EvaluateRecipe(
        fit=FitConfig(iterations=20),
        max_frames=12,
        max_cameras=8,
        picture_frames=3,
    )
    tracking: TrackingConfig | None = None


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, and the headline table.

    Attributes:
        report: URI of the HTML page.
        headline: the table's rows.
        model: ``models:/`` URI of the model that was judged.
        promoted: whether it became the champion in this run.
        seconds: step -> wall-clock time.
    """

    report: str
    headline: tuple[HeadlineRow, ...]
    model: str
    promoted: bool
    seconds: dict[str, float]


def demo(out_uri: str, recipe: DemoRecipe) -> DemoResult:
    """Run everything; ``out_uri`` may be a folder or an ``s3://`` URI.

    Raises:
        LipflowError: whatever a job raises.
    """
    out_uri = storage.normalize_uri(out_uri)
    storage.check_writable(out_uri)
    tracking = recipe.tracking or _tracking_beside(out_uri)
    clock = _Clock()
    capture_uri, shards_uri = storage.join(out_uri, "capture"), storage.join(out_uri, "shards")
    with ray_cluster():
        with clock.measure("synthesise"):
            synthesise(capture_uri, recipe.dome)
        with clock.measure("shard"):
            shards = shard(capture_uri, shards_uri, ShardRecipe(shard=recipe.shard, tracking=tracking))
        trained, evaluations = {}, {}
        for method in METHODS:
            settings = getattr(recipe, method).model_copy(update={"tracking": tracking})
            with clock.measure(f"train {method}"):
                trained[method] = train(shards_uri, storage.join(out_uri, method), settings)
        for method, summary in trained.items():
            settings = getattr(recipe, f"evaluate_{method}").model_copy(update={"tracking": tracking})
            with clock.measure(f"evaluate {method}"):
                evaluations[method] = evaluate(
                    summary.model or summary.avatar,
                    shards_uri,
                    storage.join(out_uri, f"evaluation-{method}"),
                    settings,
                    parent_run=summary.run_id,
                )
        candidate = trained["lipflow"].model
        if candidate is None:
            raise ConfigError("lipflow.register_as is null: the demo promotes a registered model; name one")
        with clock.measure("promote"):
            decision = promote_model(candidate, PromoteRecipe(tracking=tracking))
    headline = tuple(headline_rows(evaluations))
    overview = driven_side_by_side(evaluations["lipflow"])
    storage.write_bytes(storage.join(out_uri, "overview.png"), png_bytes(overview.image))
    report_uri = storage.join(out_uri, "report.html")
    content = report_content(
        DemoOutcome(recipe.dome.face, shards, trained, evaluations, decision, clock.seconds, tracking),
        overview,
        recipe.model_dump(mode="json"),
    )
    render_report(report_uri, content)
    return DemoResult(report_uri, headline, candidate, decision.promoted, clock.seconds)


class _Clock:
    """Wall-clock seconds of named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - began


def _tracking_beside(out_uri: str) -> TrackingConfig:
    """``MLFLOW_TRACKING_URI`` if it is set; else a database in a local output folder, or in the working folder."""
    if os.environ.get("MLFLOW_TRACKING_URI") or not storage.is_local(out_uri):
        return TrackingConfig()
    return TrackingConfig(uri=f"sqlite:///{storage.local_path(out_uri)}/mlflow.db")


def demo_command(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where everything goes.")] = "demo-out",
    face: Annotated[str | None, typer.Option("--face", metavar="DIR", help="Real face asset with its KRT rig.")] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Capture, shards, two trainings, evaluations, a champion and a report, in minutes, on two cores."""
    overrides = list(set_ or ())
    if face is not None:
        krt = Path(face, "KRT")
        overrides = [f"dome.face={face}", *([f"dome.krt={krt}"] if krt.is_file() else []), *overrides]
    result = demo(out, load_recipe(DemoRecipe, recipe, overrides))
    if not as_json:
        print_table(result.headline, title="Held-out expressions")
    document = {name: getattr(result, name) for name in result.__dataclass_fields__ if name != "headline"}
    command.emit(
        document | {"headline": [asdict(row) for row in result.headline]},
        as_json,
        f"report: {result.report}\nmodel:  {result.model} "
        f"({'the new champion' if result.promoted else 'not better than the champion'})\n"
        f"time:   {sum(result.seconds.values()):.0f} s",
    )


if __name__ == "__main__":
    command.run_job("cluster.demo", "demo_command")
