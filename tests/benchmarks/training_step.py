"""Where the time of a training step goes: ``python tests/benchmarks/training_step.py [--against TREE]``.

The ``small`` preset: texture 128, pictures of 192x128, 4 frames x 3 views, the real face's topology (11,432
triangles, 7,306 vertices) or, where its folder is not here, the procedural head. Each part is timed alone, with its
backward pass, and then the whole step (:mod:`training_step_rows`); ``rest`` is the step less its parts: the loss terms
and what autograd adds up. With ``--against``, another checkout of this project does the same in a process of its own,
passes are taken in turns, and the ratio is the median over pairs of passes, so that a machine whose speed drifts does
not decide.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from render_tables import facts
from timed_rows import Pass, Row
from training_step_rows import PARTS

from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.shards import write_shards

_HERE = Path(__file__).resolve().parent
_TREE = _HERE.parents[1]
_FACE = _TREE.parent / "shared" / "assets" / "realface"
_SIGNALS = ("hmc", "frontal", "keypoints")


def write_preset_shards(out: Path, face: Path | None) -> str:
    """A few frames of a dome at the preset's sizes, as a shard set; kept if it is there already."""
    shards = out / "shards"
    if not (shards / "manifest.json").exists():
        config = DomeConfig(
            cameras=8,
            segments=8,
            frames_per_segment=2,
            image_size_hw=(192, 128),
            texture_size=128,
            face=None if face is None else str(face),
        )
        write_dome(config, str(out / "capture"))
        write_shards(open_capture(str(out / "capture")), ShardConfig(texture_size=128), str(shards))
    return str(shards)


def part_names(method: str) -> tuple[str, ...]:
    """The parts that a row of the method serves, in their order."""
    absent = {"dam": (*_SIGNALS, "flow"), "conditional": ("flow",)}.get(method, ())
    return tuple(name for name in PARTS if name not in absent)


def measure(trees: list[Path], shards: str, method: str, options: dict, repeats: int) -> list[dict[str, list[Pass]]]:
    """Passes of each part for each tree, in turns; the first pass of a part warms up and does not count."""
    with tempfile.TemporaryDirectory(prefix="training-step-") as logs:
        rows = [
            Row(
                [sys.executable, str(_HERE / "training_step_rows.py"), str(tree), shards, method, json.dumps(options)],
                Path(logs, f"{number}.log"),
            )
            for number, tree in enumerate(trees)
        ]
        passes: list[dict[str, list[Pass]]] = [{} for _ in trees]
        try:
            for row in rows:
                row.wait_until_ready()
            for repeat in range(repeats + 1):
                print(f"\r{method} {repeat}/{repeats}  ", end="", file=sys.stderr, flush=True)
                for name in part_names(method):
                    for row, taken in zip(rows, passes, strict=True):
                        measured = row.run_pass(options["threads"])
                        if repeat:
                            taken.setdefault(name, []).append(measured)
        finally:
            print(file=sys.stderr)
            for row in rows:
                row.close()
    return passes


def table(passes: list[dict[str, list[Pass]]], clock: str) -> None:
    """Milliseconds by part in Markdown; with two trees, the other one's and its ratio to ours."""
    times = [{name: [_ms(taken, clock) for taken in row] for name, row in tree.items()} for tree in passes]
    names = list(times[0])
    for tree in times:
        sums = [sum(tree[name][index] for name in names if name != "step") for index in range(len(tree["step"]))]
        tree["rest"] = [step - parts for step, parts in zip(tree["step"], sums, strict=True)]
    compared = len(times) == 2
    print("| part | ms |" + (" other, ms | other / this |" if compared else ""))
    print("|---|---:|" + ("---:|---:|" if compared else ""))
    for name in [*(name for name in names if name != "step"), "rest", "step"]:
        cells = [name, *(f"{statistics.median(tree[name]):.1f}" for tree in times)]
        if compared:
            ratios = [other / ours for ours, other in zip(times[0][name], times[1][name], strict=True)]
            cells.append("" if name == "rest" else f"{statistics.median(ratios):.2f}")
        print("| " + " | ".join(cells) + " |")
    print()


def _ms(taken: Pass, clock: str) -> float:
    return (taken.cpu_s if clock == "cpu" else taken.seconds) / taken.views * 1e3


def main() -> None:
    """Measure and print a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of this project, to compare with")
    parser.add_argument("--method", action="append", default=[], help="dam, lipflow, ...; default: these two")
    parser.add_argument("--frames", type=int, default=4, help="of a batch")
    parser.add_argument("--views", type=int, default=3, help="of each frame")
    parser.add_argument("--avatar", default="{}", help='fields of AvatarConfig, as JSON: {"upsample": "bilinear"}')
    parser.add_argument("--antialias", action="store_true", help="renderings are blended across silhouettes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="passes of each part after the first")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is not idle")
    parser.add_argument("--scratch", type=Path, help="keep the shard set here for the next run")
    parser.add_argument("--face", type=Path, default=_FACE if _FACE.is_dir() else None, help="folder of a face asset")
    given = parser.parse_args()
    options = {name: getattr(given, name) for name in ("frames", "views", "threads", "antialias")}
    options["avatar"] = json.loads(given.avatar)
    facts(None)
    with ExitStack() as stack:
        scratch = given.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="training-step-")))
        shards = write_preset_shards(scratch, given.face)
        trees = [_TREE] if given.against is None else [_TREE, given.against.resolve()]
        for method in given.method or ["dam", "lipflow"]:
            print(f"`{method}`, {given.frames} frames x {given.views} views, {given.clock} time:\n")
            table(measure(trees, shards, method, options, given.repeats), given.clock)


if __name__ == "__main__":
    main()
