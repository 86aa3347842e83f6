"""Where the time of an evaluation goes: ``python tests/benchmarks/evaluation.py AVATAR SHARDS``.

One process on one core does what the tasks of ``lipflow evaluate`` do: for each signal a fit of all frames side by
side, and the scores of faces after several numbers of iterations. Times are CPU seconds, after everything was compiled.
Those of a fit are measured over ``--iterations`` and stated for ``--for-iterations``.
"""

from __future__ import annotations

import argparse
import time

import torch

from cluster.scores.scene import open_scene
from cluster.scores.scoring import (
    TaskResult,
    held_out_cameras,
    score_fits,
    score_reconstructions,
    scored_cameras,
)
from lipflow.config import FitConfig, RenderConfig
from lipflow.fitting import fit
from pipeline.sharding.splits import spread

ROWS = 4
"""Numbers of iterations that are scored: 0, 10, 50, 200."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("avatar")
    parser.add_argument("shards")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--cameras", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--for-iterations", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = (options.avatar, options.shards, RenderConfig())
    scene = open_scene(*place)
    shards = scene.shards
    frames, cameras = spread(shards.frame_ids("test"), options.frames), scored_cameras(shards, options.cameras)
    print(f"{len(frames)} frames x {len(cameras)} cameras of {shards.cameras[0].image_size_hw} pixels\n")
    print("| part | CPU s | of which |")
    print("| --- | ---: | --- |")
    for signal in scene.avatar.signals or scene.avatar.context.offered_signals:
        driving = shards.frames(frames, cameras[:1]).driving
        config = FitConfig(iterations=options.iterations)
        fit(scene.avatar, scene.renderer, driving, signal, config.model_copy(update={"iterations": 1}))
        began = time.process_time()
        fit(scene.avatar, scene.renderer, driving, signal, config)
        step_s = (time.process_time() - began) / (options.iterations + 1)
        print(f"| fit {signal} | {step_s * options.for_iterations:.1f} | {step_s:.3f} an iteration of all frames |")
    score_fits(*place, frames[:1], cameras, "keypoints", FitConfig(iterations=1), (0,))
    few, many = (_scoring_s(place, frames, cameras, count) for count in (1, 1 + ROWS))
    per_face = (many - few) / ROWS / len(frames)
    print(f"| scores of {ROWS} rows a signal | {many - few:.1f} | {per_face:.3f} a face in all cameras |")
    began = time.process_time()
    result: TaskResult = score_reconstructions(*place, frames, cameras, held_out_cameras(shards), {})
    print(f"| encoder and mean face | {time.process_time() - began:.1f} | {len(result.scores)} scores |")


def _scoring_s(place: tuple, frames: list[str], cameras: list[str], rows: int) -> float:
    """CPU seconds of the cheapest fit with so many scored rows; differences are those of scoring."""
    began = time.process_time()
    score_fits(*place, frames, cameras, "keypoints", FitConfig(iterations=rows - 1), tuple(range(rows)))
    return time.process_time() - began


if __name__ == "__main__":
    main()
