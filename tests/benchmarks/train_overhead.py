"""What Ray Train costs a step, and what a second worker does: ``python tests/benchmarks/train_overhead.py [--quick]``.

The very loop of the train job (:func:`cluster.training.loop.train_loop`) runs inside ``TorchTrainer`` and under
``torchrun``, with one worker and with two. Weak scaling: each worker has one micro-batch of the ``small`` preset, so
that two workers do twice the work. A run's figure is the median of the seconds between the ends of two steps, without
the first ones. Runs of both kinds take turns, since shared machines change their speed: a row has the medians over its
runs, and the median and the range of the ratios of neighbours. Tracking is off; the only validation comes after the
last step.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from render_tables import facts
from training_step import _FACE, write_preset_shards

from cluster.recipe import load_recipe
from cluster.training.loop import Training, train_loop
from cluster.training.recipe import TrainRecipe
from cluster.training.worker import Worker, ray_worker
from lipflow.config import AvatarConfig
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.loading.loader import LoaderConfig
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.shards import write_shards

_HERE = Path(__file__).resolve().parent
_PRESET = _HERE.parents[1] / "infra/recipes/small-lipflow.yaml"
_WARM_UP_STEPS = 3


def quick_shards(out: Path) -> str:
    """A set of which a step takes milliseconds: it shows that this runs, and no more."""
    sizes = {"image_size_hw": (24, 18), "texture_size": 32, "headset_image_size_hw": (8, 8), "supersampling": 1}
    write_dome(DomeConfig(cameras=4, segments=5, frames_per_segment=3, **sizes), str(out / "capture"))
    write_shards(open_capture(str(out / "capture")), ShardConfig(frames_per_shard=3), str(out / "shards"))
    return str(out / "shards")


def quick_recipe() -> TrainRecipe:
    """For :func:`quick_shards`."""
    sizes = {"latent_size": 6, "hidden_size": 12, "encoder_channels": (6, 5, 4), "decoder_channels": (6, 5, 4)}
    return TrainRecipe(
        avatar=AvatarConfig.small(texture_size=32, driver_image_size=16, **sizes),
        loader=LoaderConfig(frames_per_batch=1, views_per_frame=2, decode_threads=1),
    )


def settings_of(shards: str, workers: int, steps: int, *, quick: bool, use_gpu: bool) -> dict[str, Any]:
    """What a row's processes are given, as JSON."""
    base = quick_recipe() if quick else load_recipe(TrainRecipe, str(_PRESET))
    measured = {
        "steps": steps,
        "checkpoint_every_steps": steps,
        "validation_frames": 1,
        "validation_cameras": 1,
        "workers": workers,
        "micro_batches": workers,
        "use_gpu": use_gpu,
    }
    recipe = TrainRecipe.model_validate(base.model_dump() | measured)
    return {"recipe": recipe.model_dump(mode="json"), "shards": shards}


def timed(settings: dict[str, Any], worker: Worker, out: Path) -> None:
    """Run the loop, and write the seconds of each step of the first worker to ``out/times.json``."""
    ends: list[float] = []

    # The loop asks once after every step.
    def end_of_step() -> bool:
        ends.append(time.perf_counter())
        return False

    recipe = TrainRecipe.model_validate(settings["recipe"])
    training = Training(recipe, settings["shards"], str(out / "training"))
    train_loop(training, dataclasses.replace(worker, asked_to_leave=end_of_step))
    if worker.rank == 0:
        seconds = [after - before for before, after in itertools.pairwise(ends)]
        (out / "times.json").write_text(json.dumps(seconds[_WARM_UP_STEPS:]))


def under_torchrun(settings_file: Path) -> None:
    """The process that torchrun starts."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    settings = json.loads(settings_file.read_text())
    cuda = settings["recipe"]["use_gpu"]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    timed(settings, Worker(rank, world_size, device, lambda metrics: None, lambda: False), settings_file.parent)
    torch.distributed.destroy_process_group()


def by_torchrun(settings: dict[str, Any], workers: int, out: Path) -> None:
    """One row under torchrun."""
    (out / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    subprocess.run([*command, __file__, "--worker", str(out / "settings.json")], check=True)


def by_ray(settings: dict[str, Any], workers: int, out: Path) -> None:
    """One row inside TorchTrainer, on a cluster of its own."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.runtime import ray_cluster
    from cluster.training.process_group import NodeTorchConfig

    def run(given: dict[str, Any]) -> None:
        timed(given, ray_worker(), out)

    with ray_cluster():
        TorchTrainer(
            run,
            train_loop_config=settings,
            torch_config=NodeTorchConfig(),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=settings["recipe"]["use_gpu"], resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(name="overhead", storage_path=str(out / "ray")),
        ).fit()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps: shows that it runs")
    parser.add_argument("--steps", type=int, help="default: 60, with --quick 8")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker")
    parser.add_argument("--face", type=Path, default=_FACE if _FACE.is_dir() else None, help="folder of a face asset")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        under_torchrun(given.worker)
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    facts(None)
    steps = given.steps or (8 if given.quick else 60)
    with tempfile.TemporaryDirectory(prefix="train-overhead-") as temporary:
        scratch = Path(temporary)
        shards = quick_shards(scratch) if given.quick else write_preset_shards(scratch, given.face)
        print("| workers | torchrun, ms | Ray Train, ms | Ray Train / torchrun | range |\n|---:|---:|---:|---:|---:|")
        for workers in given.workers:
            settings = settings_of(shards, workers, steps, quick=given.quick, use_gpu=given.gpu)
            seconds: dict[str, list[float]] = {"torchrun": [], "ray": []}
            for repeat in range(given.repeats):
                for name, start in (("torchrun", by_torchrun), ("ray", by_ray)):
                    out = scratch / f"{name}-{workers}-{repeat}"
                    out.mkdir()
                    start(settings, workers, out)
                    seconds[name].append(statistics.median(json.loads((out / "times.json").read_text())))
            ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
            row = [f"{statistics.median(values) * 1e3:.1f}" for values in seconds.values()]
            row += [f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"]
            print(f"| {workers} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
