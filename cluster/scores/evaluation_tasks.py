"""An evaluation as maps of Ray tasks: what is scored, what shakes, what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from cluster.reports.gallery import Failure, Picture, draw_pictures
from cluster.runtime import map_tasks
from cluster.scores.scoring import (
    ColorTable,
    LatentKey,
    TaskResult,
    measure_jitter,
    score_fits,
    score_reconstructions,
)
from cluster.scores.sheet import FrameScore
from lipflow.config import FitConfig, RenderConfig
from pipeline.loading.loader import ShardSet


@dataclass(frozen=True)
class EvaluationPlan:
    """What is scored.

    Attributes:
        avatar_uri: where workers find the avatar.
        shards_uri: the shard set.
        render: how images are drawn.
        fit: with the most iterations.
        iterations: after which fits are scored, ascending.
        train_frames: of training segments; () if that quadrant is not wanted.
        held_out_frames: of held-out segments.
        train_cameras: scored.
        held_out_cameras: scored; () if those quadrants are not wanted.
        signals: to drive with.
        frames_per_task: fitted side by side.
    """

    avatar_uri: str
    shards_uri: str
    render: RenderConfig
    fit: FitConfig
    iterations: tuple[int, ...]
    train_frames: tuple[str, ...]
    held_out_frames: tuple[str, ...]
    train_cameras: tuple[str, ...]
    held_out_cameras: tuple[str, ...]
    signals: tuple[str, ...]
    frames_per_task: int


@dataclass
class Scored:
    """What all tasks brought.

    Attributes:
        scores: rows.
        latents: z of every row.
        traces: driving signal -> mean observed loss at every iteration.
        seconds: driving signal -> spent in fitting, over all tasks.
    """

    scores: list[FrameScore] = field(default_factory=list)
    latents: dict[LatentKey, list[float]] = field(default_factory=dict)
    traces: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def score_all(plan: EvaluationPlan, colors: ColorTable) -> Scored:
    """Every frame's reconstruction and every held-out frame's fit, and how much both shake."""
    size, held_out = plan.frames_per_task, plan.held_out_frames
    fits = [
        (signal, held_out[start : start + size]) for signal in plan.signals for start in range(0, len(held_out), size)
    ]
    place = (plan.avatar_uri, plan.shards_uri, plan.render)
    tasks: list[tuple] = [
        ("fit", (*place, frames, plan.train_cameras, signal, plan.fit, plan.iterations)) for signal, frames in fits
    ]
    reconstructed = (*plan.train_frames, *held_out)
    tasks += [
        (
            "reconstruction",
            (*place, reconstructed[start : start + size], plan.train_cameras, plan.held_out_cameras, colors),
        )
        for start in range(0, len(reconstructed), size)
    ]
    results: list[TaskResult] = map_tasks(_run_task, tasks, description="score frames")
    scored = Scored()
    for result in results:
        scored.scores += result.scores
        scored.latents |= result.latents
    for (signal, frames), result in zip(fits, results, strict=False):
        share = len(frames) / len(held_out)
        before = scored.traces.get(signal, [0.0] * len(result.trace))
        scored.traces[signal] = [a + share * b for a, b in zip(before, result.trace, strict=True)]
        scored.seconds[signal] = scored.seconds.get(signal, 0.0) + result.seconds
    _add_jitter(plan, scored)
    return scored


def draw(plan: EvaluationPlan, scored: Scored, shown: Sequence[str], failures: Sequence[Failure]) -> list[Picture]:
    """Pictures of the ``shown`` frames by the encoder and every signal's longest fit, and of all failures."""
    wanted: dict[str, dict[str, list[float]]] = {}
    failed = {(failure.score.latent, failure.score.frame_id) for failure in failures}
    longest: dict[str, int] = {}
    for latent, iterations, _ in scored.latents:
        longest[latent] = max(iterations, longest.get(latent, 0))
    for (latent, iterations, frame_id), z in scored.latents.items():
        if iterations == longest[latent] and (frame_id in shown or (latent, frame_id) in failed):
            wanted.setdefault(latent, {})[frame_id] = z
    tasks = [(plan.avatar_uri, plan.shards_uri, plan.render, latent, codes) for latent, codes in wanted.items()]
    drawn = map_tasks(draw_pictures, tasks, description="draw pictures") if tasks else []
    return [picture for pictures in drawn for picture in pictures]


def consecutive_runs(chosen: Sequence[str], everything: Sequence[str]) -> list[list[str]]:
    """The chosen frames in runs of neighbours in time, of at least three frames each.

    Args:
        chosen: frame ids, sorted.
        everything: all frames of the split, sorted. Where names are numbers, neighbours differ by the smallest step of
            their segment, so a frame that the capture lost ends a run; else they stand next to each other here.
    """
    place = {frame_id: index for index, frame_id in enumerate(everything)}
    by_segment: dict[str, list[str]] = {}
    for frame_id in everything:
        by_segment.setdefault(frame_id.split("/")[0], []).append(frame_id)
    time: dict[str, int] = {}
    step: dict[str, int] = {}
    for segment, frames in by_segment.items():
        names = [frame_id.split("/")[1] for frame_id in frames]
        numbers = [int(name) for name in names] if all(map(str.isdigit, names)) else [place[f] for f in frames]
        time |= dict(zip(frames, numbers, strict=True))
        step[segment] = min((b - a for a, b in pairwise(numbers)), default=1)
    runs: list[list[str]] = []
    for frame_id in chosen:
        segment = frame_id.split("/")[0]
        last = runs[-1][-1] if runs else None
        follows = last is not None and last.split("/")[0] == segment
        if last is not None and follows and time[frame_id] - time[last] == step[segment]:
            runs[-1].append(frame_id)
        else:
            runs.append([frame_id])
    return [run for run in runs if len(run) >= 3]


def _add_jitter(plan: EvaluationPlan, scored: Scored) -> None:
    shards = ShardSet.open(plan.shards_uri)
    kinds = list(dict.fromkeys((latent, iterations) for latent, iterations, _ in scored.latents))
    runs = [run for split in ("train", "test") for run in _runs_of(plan, shards, split)]
    tasks = []
    for run in runs:
        codes = {
            kind: [scored.latents[*kind, frame] for frame in run]
            for kind in kinds
            if all((*kind, frame) in scored.latents for frame in run)
        }
        tasks.append((plan.avatar_uri, plan.shards_uri, plan.render, run, codes))
    if not tasks:
        return
    found: dict[LatentKey, tuple[float, float]] = {}
    for result in map_tasks(measure_jitter, tasks, description="measure jitter"):
        found |= result
    for index, score in enumerate(scored.scores):
        pair = found.get((score.latent, score.iterations, score.frame_id))
        if pair is not None and score.cameras == "train":
            scored.scores[index] = replace(score, jitter_mm=pair[0], target_jitter_mm=pair[1])


def _runs_of(plan: EvaluationPlan, shards: ShardSet, split: str) -> list[list[str]]:
    return consecutive_runs(plan.train_frames if split == "train" else plan.held_out_frames, shards.frame_ids(split))


def _run_task(kind: str, arguments: tuple) -> TaskResult:
    return score_fits(*arguments) if kind == "fit" else score_reconstructions(*arguments)
