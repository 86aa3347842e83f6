"""How sharding scales with workers, and what memory it takes: ``python tests/benchmarks/sharding.py``.

One capture, whose pictures are hard links to those of two synthesised frames, is sharded by the job itself on a Ray
cluster of this machine: with one worker, and with two. Clusters are started, and workers warmed up by a small set,
before the clock runs. Beside the rates stands the same work as plain processes, each with a core of its own and half
of the shards, which is the most that this machine gives.

Then the same capture at 1, 4 and 16 times its length is written by one process, whose peak memory is told.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.dome.writer import DomeConfig, write_dome

LENGTHS = (1, 4, 16)
SEGMENTS = 4
DOME = DomeConfig(
    cameras=8,
    image_size_hw=(1024, 667),
    texture_size=512,
    segments=SEGMENTS,
    frames_per_segment=2,
    supersampling=1,
)
# Not ru_maxrss: that survives exec, and so is at least the peak of the process that started this one.
PEAK = """
import re, sys
from pipeline.sharding.shards import ShardConfig, write_shards
from pipeline.sharding.splits import SplitConfig
splits = SplitConfig(test_fraction=0, val_fraction=0)
write_shards(sys.argv[1], ShardConfig(codec=sys.argv[3], frames_per_shard=4, splits=splits), sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codec", default="jpeg", help="of the stored images")
    parser.add_argument("--frames", type=int, default=48, help="frames of the capture whose sharding is timed")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each kind; the median is told")
    parser.add_argument("--skip-rates", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        write_dome(DOME, str(base))
        if not options.skip_rates:
            Console().print(_rates(base, options.codec, options.frames, options.repeats))
        if not options.skip_memory:
            Console().print(_peaks(base, options.codec))


def _rates(base: Path, codec: str, frames: int, repeats: int) -> Table:
    scratch = base.parent
    capture, small = _lengthened(base, frames), _lengthened(base, 2 * SEGMENTS)
    rates: dict[str, dict[int, float]] = {}
    for kind, measure in (("Ray tasks", _ray_seconds), ("plain processes", _process_seconds)):
        rates[kind] = {}
        for workers in (1, 2):
            seconds = measure(scratch, small, capture, codec, workers, repeats)
            rates[kind][workers] = frames / statistics.median(seconds)
    table = Table(title=f"sharding, 8 cameras of 1024x667, {codec}, median of {repeats}")
    for column in ("", "1 worker, frames/s", "2 workers, frames/s", "2 workers / 1"):
        table.add_column(column, justify="right")
    for kind, of in rates.items():
        table.add_row(kind, f"{of[1]:.2f}", f"{of[2]:.2f}", f"{of[2] / of[1]:.2f}")
    return table


def _peaks(base: Path, codec: str) -> Table:
    table = Table(title=f"peak memory of one writer, textures of 512, {codec}")
    for column in ("length", "frames", "peak, MB", "of the shortest"):
        table.add_column(column, justify="right")
    peaks: list[int] = []
    for length in LENGTHS:
        frames, out = 2 * SEGMENTS * length, base.with_name(f"shards-{length}")
        command = [sys.executable, "-c", PEAK, _lengthened(base, frames), str(out), codec]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        shutil.rmtree(out)
        ratio = f"{peaks[-1] / peaks[0]:.2f}"
        table.add_row(f"{length}x", str(frames), f"{peaks[-1] * 1024 / 1e6:.0f}", ratio)
    return table


def _ray_seconds(scratch: Path, small: str, capture: str, codec: str, workers: int, repeats: int) -> list[float]:
    """Wall time of the map over all shards on a cluster of so many CPUs, as the job runs it."""
    # Ray reads these once, when it is imported, which cluster.runtime does after it has kept it to loopback.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    from cluster.runtime import OBJECT_STORE_BYTES, map_tasks, ray
    from pipeline.sharding.shards import finish_shard

    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    try:
        seconds = []
        for index, source in enumerate([small] + [capture] * repeats):
            arguments = _arguments(source, codec, str(scratch / f"ray-{workers}-{index}"))
            started_s = time.perf_counter()
            map_tasks(finish_shard, arguments, description="shard", receive=lambda outcome: outcome.record)
            seconds.append(time.perf_counter() - started_s)
        return seconds[1:]
    finally:
        ray.shutdown()


def _process_seconds(scratch: Path, small: str, capture: str, codec: str, workers: int, repeats: int) -> list[float]:
    """Wall time until all of so many processes have written their shards; each takes the next one when it is free."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        seconds = []
        for index, source in enumerate([small] + [capture] * repeats):
            arguments = _arguments(source, codec, str(scratch / f"processes-{workers}-{index}"))
            started_s = time.perf_counter()
            pool.starmap(_finish_shard, arguments, chunksize=1)
            seconds.append(time.perf_counter() - started_s)
        return seconds[1:]


def _finish_shard(*arguments) -> None:
    from pipeline.sharding.shards import finish_shard

    finish_shard(*arguments)


def _arguments(capture: str, codec: str, out: str) -> list[tuple]:
    from pipeline.sharding.shards import ShardConfig, open_for_sharding, plan_shards

    config = ShardConfig(codec=codec, frames_per_shard=2)
    plan = plan_shards(open_for_sharding(capture, config), config)
    return [(capture, plan.config, task, out) for task in plan.shards]


def _lengthened(base: Path, frames: int) -> str:
    """The capture with its frames repeated, by hard links, until it has so many."""
    folder = base.with_name(f"capture-{frames}")
    if not folder.exists():
        shutil.copytree(base, folder, copy_function=os.link)
        for path in [path for path in folder.rglob("00000?*") if path.is_file()]:
            for number in range(int(path.name[:6]) + 2, frames // SEGMENTS, 2):
                os.link(path, path.with_name(f"{number:06d}{path.name[6:]}"))
        names = sorted(path.name for path in (folder / "images").iterdir())
        lines = [f"{name} {number:06d}\n" for name in names for number in range(frames // SEGMENTS)]
        (folder / "frame_list.txt").unlink()
        (folder / "frame_list.txt").write_text("".join(lines))
    return str(folder)


if __name__ == "__main__":
    main()
