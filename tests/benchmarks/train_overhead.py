"""What Ray Train costs a step, and what a second worker does: ``python tests/benchmarks/train_overhead.py [--quick]``.

The very loop of the train job (:func:`cluster.training.loop.train_loop`) runs inside ``TorchTrainer`` and under
``torchrun``, on the ``small`` preset. Tracking is off, and the only validation comes after the last step.

- **Side by side**: one worker of each kind at the same time, so that a shared machine's changes of speed meet both.
  Figures are medians over the steps of the time in which both train, of the seconds from the end of a step to that of
  the next, and of the CPU seconds that the worker's process takes meanwhile.
- **Weak scaling**: each worker has one micro-batch, so that two do twice the work. Runs take turns; a row has the
  medians over its runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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
    """Run the loop; the first worker's clock and CPU time at the end of each step go to ``out/ends.json``."""
    ends: list[tuple[float, float]] = []

    # The loop asks once after every step.
    def end_of_step() -> bool:
        ends.append((time.monotonic(), time.process_time()))
        (out / "started").touch()
        return False

    recipe = TrainRecipe.model_validate(settings["recipe"])
    training = Training(recipe, settings["shards"], str(out / "training"))
    train_loop(training, dataclasses.replace(worker, asked_to_leave=end_of_step))
    if worker.rank == 0:
        (out / "ends.json").write_text(json.dumps(ends[_WARM_UP_STEPS:]))


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


def side_by_side(settings: dict[str, Any], out: Path) -> list[tuple[float, float]]:
    """(seconds, CPU seconds) of a step under torchrun and inside TorchTrainer, of the time in which both trained."""
    folders = [out / "torchrun", out / "ray"]
    for folder in folders:
        folder.mkdir(parents=True)

    def join_in() -> None:
        while not (folders[1] / "started").exists():
            time.sleep(0.1)
        by_torchrun(settings, 1, folders[0])

    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(join_in)
        by_ray(settings, 1, folders[1])
        joined.result()
    runs = [json.loads((folder / "ends.json").read_text()) for folder in folders]
    first, last = max(ends[0][0] for ends in runs), min(ends[-1][0] for ends in runs)
    return [step_of([end for end in ends if first <= end[0] <= last]) for ends in runs]


def step_of(ends: list[tuple[float, float]]) -> tuple[float, float]:
    """Median seconds and CPU seconds of a step."""
    wall, cpu = zip(*((after[0] - before[0], after[1] - before[1]) for before, after in pairwise(ends)), strict=True)
    return statistics.median(wall), statistics.median(cpu)


def print_side_by_side(settings: dict[str, Any], repeats: int, scratch: Path) -> None:
    """One row a run, and the medians of its ratios."""
    print("\n| side by side | torchrun, ms | Ray Train, ms | ratio | torchrun, CPU ms | Ray Train, CPU ms | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    ratios = []
    for repeat in range(repeats):
        theirs, ours = side_by_side(settings, scratch / f"side-{repeat}")
        ratios.append([own / other for own, other in zip(ours, theirs, strict=True)])
        cells = [
            f"{other * 1e3:.1f} | {own * 1e3:.1f} | {own / other:.3f}" for own, other in zip(ours, theirs, strict=True)
        ]
        print(f"| run {repeat + 1} | {' | '.join(cells)} |", flush=True)
    wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"| median | | | {wall:.3f} | | | {cpu:.3f} |", flush=True)


def print_weak_scaling(settings: list[dict[str, Any]], repeats: int, scratch: Path) -> None:
    """A row for each number of workers."""
    print("\n| workers | torchrun, ms | of one worker's rate | Ray Train, ms | of one worker's rate |")
    print("|---:|---:|---:|---:|---:|")
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    for repeat in range(repeats):
        for given in settings:
            workers = given["recipe"]["workers"]
            for name, start in (("torchrun", by_torchrun), ("ray", by_ray)):
                out = scratch / f"{name}-{workers}-{repeat}"
                out.mkdir()
                start(given, workers, out)
                seconds[workers, name].append(step_of(json.loads((out / "ends.json").read_text()))[0])
    steps = {key: statistics.median(values) for key, values in seconds.items()}
    fewest = settings[0]["recipe"]["workers"]
    for given in settings:
        workers = given["recipe"]["workers"]
        cells = [
            f"{steps[workers, name] * 1e3:.1f} | {steps[fewest, name] / steps[workers, name]:.2f}"
            for name in ("torchrun", "ray")
        ]
        print(f"| {workers} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps: shows that it runs")
    parser.add_argument("--steps", type=int, help="default: 60, with --quick 400")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of the weak scaling; empty: none")
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker")
    parser.add_argument("--face", type=Path, default=_FACE if _FACE.is_dir() else None, help="folder of a face asset")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        under_torchrun(given.worker)
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # By default Ray's workers give way to other processes, which torchrun's do not.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - it is written so
    facts(None)
    steps = given.steps or (400 if given.quick else 60)
    with tempfile.TemporaryDirectory(prefix="train-overhead-") as temporary:
        scratch = Path(temporary)
        shards = quick_shards(scratch) if given.quick else write_preset_shards(scratch, given.face)

        def settings(workers: int) -> dict[str, Any]:
            return settings_of(shards, workers, steps, quick=given.quick, use_gpu=given.gpu)

        print_side_by_side(settings(1), given.repeats, scratch)
        if given.workers:
            print_weak_scaling([settings(workers) for workers in given.workers], given.repeats, scratch)


if __name__ == "__main__":
    main()
