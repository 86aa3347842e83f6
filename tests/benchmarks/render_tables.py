"""The tables that ``render.py`` prints, in Markdown for ``RESULTS.md``."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from timed_rows import Pass

if TYPE_CHECKING:
    from render import Timed
    from render_scenes import Case

_HERE = Path(__file__).resolve().parent
_COLOUR_MATTERS = 1 / 255


def facts(peer_python: str | None) -> None:
    """The command that is running, date, commit, machine and versions."""
    git = ["git", "-C", str(_HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = cpus[0].partition(":")[2].strip() if cpus else platform.machine()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    script = f"tests/benchmarks/{Path(sys.argv[0]).name}"
    print(f"`{shlex.join(['python', script, *sys.argv[1:]])}`, commit {commit},")
    print(f"{datetime.date.today().isoformat()}, {model}, {cores} cores, load {load:.1f} at the start; ", end="")
    query = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in %r), sep=', ')"
    asked = [(sys.executable, ("torch", "numpy", "numba"))]
    asked += [] if peer_python is None else [(peer_python, ("moderngl", "open3d-cpu"))]
    for python, names in asked:
        found = subprocess.run([python, "-c", query % (names,)], capture_output=True, text=True, check=False)
        print(found.stdout.strip() or "versions unknown", end="; ")
    print("\n")


def equality_table(measured: list[Timed]) -> None:
    """Whether a row draws what we draw, and why it is absent if it is."""
    ours = measured[0].shown
    _row("row", "other triangles", "covered pixels", "largest colour difference elsewhere")
    _row("---", "---:", "---:", "---:")
    for timed in measured[1:]:
        if timed.absent is not None:
            _row(timed.kind, f"not measured: {timed.absent}", "", "")
            continue
        other = (timed.shown["ids"] != ours["ids"]) & ((ours["ids"] >= 0) | (timed.shown["ids"] >= 0))
        colour = np.abs(timed.shown["image"] - ours["image"]).max(0)[~other].max()
        _row(timed.kind, str(int(other.sum())), f"{int((ours['ids'] >= 0).sum()):,}", f"{colour:.1e}")
    print()


def speed_table(measured: list[Timed], cases: list[Case], clock: str) -> None:
    """Milliseconds a view, and how many times faster than the fastest peer ours is."""
    rows = [timed for timed in measured if timed.absent is None]
    peers = [timed.kind for timed in rows[1:]]
    _row("mesh, triangles", "pixels", "views", "", *(f"{kind}, ms" for kind in ["ours", *peers]), "fastest peer / ours")
    _row("---", "---", "---:", "---", *("---:" for _ in rows), "---:")
    for case in cases:
        times = {timed.kind: _ms(timed, case, clock) for timed in rows if case in timed.passes}
        middle = {kind: statistics.median(taken) for kind, taken in times.items()}
        best = min((kind for kind in times if kind != "ours"), key=middle.__getitem__, default="")
        ratio = statistics.median(np.divide(times[best], times["ours"])) if best else None
        _row(
            case.mesh,
            f"{case.size_hw[0]}x{case.size_hw[1]}",
            str(case.views),
            "with gradients" if case.backward else "forward",
            *(f"{middle[timed.kind]:.1f}" if timed.kind in times else "" for timed in rows),
            "" if ratio is None else f"{ratio:.2f} ({best})",
        )
    print()
    gains = []
    for forward in (case for case in cases if not case.backward):
        both = [c for c in cases if c == replace(forward, scene=c.scene, backward=True)]
        if both:
            pair = zip(_ms(rows[0], both[0], clock), _ms(rows[0], forward, clock), strict=True)
            gains.append(statistics.median(with_gradients / alone - 1 for with_gradients, alone in pair))
    print(
        f"Ours, backward over forward: {min(gains):.2f} to {max(gains):.2f}, median {statistics.median(gains):.2f}.\n"
    )


def cost_table(ours: Timed, clock: str) -> None:
    """Least squares of ``a pixels + b triangles + c``, relative to the measured times."""
    found, times = [], []
    for case in ours.cases:
        with np.load(case.scene, allow_pickle=False) as scene:
            found.append([_covered(ours, case), len(scene["faces"]), case.size_hw[0] * case.size_hw[1], 1.0])
        times.append(statistics.median(_ms(ours, case, clock)))
    features, measured = np.array(found), np.array(times)
    # Relative errors count, or the largest picture would decide alone.
    solution, *_ = np.linalg.lstsq(features / measured[:, None], np.ones_like(measured), rcond=None)
    predicted = features @ solution
    _row("triangles", "pixels", "covered", "measured, ms", "fitted, ms")
    _row("---:", "---", "---:", "---:", "---:")
    for case, (covered, triangles, _, _), time, fit in zip(ours.cases, found, times, predicted, strict=True):
        pixels = f"{case.size_hw[0]}x{case.size_hw[1]}"
        _row(f"{triangles:,}", pixels, f"{int(covered):,}", f"{time:.2f}", f"{fit:.2f}")
    fitted = 1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()
    worst = np.abs(predicted / measured - 1).max()
    per_covered, per_triangle, per_pixel = solution[:3] * 1e6
    print(
        f"\n{per_covered:.1f} ns a covered pixel + {per_triangle:.1f} ns a triangle + {per_pixel:.1f} ns a pixel + "
        f"{solution[3]:.2f} ms a view; R^2 {fitted:.4f}, worst relative error {worst:.1%}.\n"
    )


def _covered(ours: Timed, case: Case) -> int:
    """Pixels of the first view that show the mesh."""
    import torch

    from lipflow.render.backend_choice import make_backend
    from lipflow.render.camera import transform_points

    with np.load(case.scene, allow_pickle=False) as scene:
        vertices, pose, camera = (torch.from_numpy(scene[name]) for name in ("vertices", "cam_from_head", "intrinsics"))
        faces = torch.from_numpy(scene["faces"])
    backend = make_backend("cpu", torch.device("cpu"), faces, torch.zeros(len(faces), 3, 2))
    seen = backend.rasterize(transform_points(vertices[None], pose[:1]), camera[:1], case.size_hw)
    return int((seen.triangle_id >= 0).sum())


def _ms(timed: Timed, case: Case, clock: str) -> list[float]:
    def seconds(one: Pass) -> float:
        return one.cpu_s if clock == "cpu" else one.seconds

    return [seconds(one) / one.views * 1e3 for one in timed.passes[case]]


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")
