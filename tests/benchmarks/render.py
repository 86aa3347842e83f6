"""How fast the renderer is, and others on the same meshes: ``python tests/benchmarks/render.py``.

Each row is a renderer in a process of its own, pinned to one core, and does the same work for each view: triangle
ids, perspective-correct texture coordinates, depth and a bilinearly textured float32 picture
(:mod:`render_rows`, :mod:`render_peers`). ``equal`` shows that it is the same work: how many covered pixels of the
first case show another triangle than ours does, and the largest difference of their colours elsewhere.

All rows' passes over a case are taken in turns, and ratios are medians over pairs of passes, so that a machine whose
speed drifts does not decide. Peers that have no gradients, or would take minutes, leave cases out.

The second table fits what our pictures cost to ``a pixels + b triangles + c`` per view, over meshes of several
sizes. With ``--cuda``, instead of all this, our CUDA backend is timed against the bare nvdiffrast calls
(:mod:`render_gpu`).

The peers' interpreter needs numpy and torch, and what it has of moderngl, open3d, drtk and pytorch3d is measured. The
last two build CUDA code when installed; :mod:`render_peer_build` builds their CPU kernels alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from render_scenes import SIZES_HW, VIEWS, Case, Mesh, ball_mesh, face_mesh, write_cases, write_scene
from render_tables import cost_table, equality_table, facts, speed_table
from timed_rows import Pass, Row, RowError

_HERE = Path(__file__).resolve().parent
_FACE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "realface"
_BALLS = ((21, 25), (101, 130), (201, 250))
"""Rings and columns: 1,000, 26,000 and 100,000 triangles."""
_RADII_MM = (40.0, 110.0, 170.0)


@dataclass
class Timed:
    """A renderer and what was measured of it.

    Attributes:
        kind: its name in :mod:`render_rows`.
        cases: those that it can do.
        passes: of each case, in the order of the repetitions, without the first.
        absent: why it was not measured; None if it was.
        shown: ``ids`` and ``image`` of the first case.
    """

    kind: str
    cases: list[Case]
    passes: dict[Case, list[Pass]] = field(default_factory=dict)
    absent: str | None = None
    shown: dict[str, np.ndarray] = field(default_factory=dict)


def can_do(kind: str, case: Case) -> bool:
    """What a row is asked for: gradients where it has them, and nothing that takes minutes."""
    if kind == "pytorch3d":
        return case.size_hw == SIZES_HW[0] and case.views == 1 and not case.backward
    if kind == "open3d":
        return case.views == 1 and not case.backward
    return kind in ("ours", "drtk") or not case.backward


def measure(kinds: dict[str, list[str]], cases: list[Case], repeats: int, scratch: Path) -> list[Timed]:
    """All rows side by side; the first pass of a case warms up and does not count.

    Args:
        kinds: row to its interpreter and options of it.
        cases: in this order.
        repeats: passes that count.
        scratch: for logs, lists and first pictures.
    """
    measured, rows = [], {}
    for kind, python in kinds.items():
        timed = Timed(kind, [case for case in cases if can_do(kind, case)])
        listing = write_cases(timed.cases, scratch / f"{kind}.json")
        command = [*python, str(_HERE / "render_rows.py"), kind, str(listing), str(scratch / f"{kind}.npz")]
        row = Row(command, scratch / f"{kind}.log")
        try:
            row.wait_until_ready()
            with np.load(scratch / f"{kind}.npz", allow_pickle=False) as stored:
                timed.shown = dict(stored)
            rows[kind] = row
        except RowError as error:
            timed.absent = str(error)
        measured.append(timed)
    try:
        for repeat in range(repeats + 1):
            for number, case in enumerate(cases):
                print(f"\r{repeat}/{repeats} case {number + 1}/{len(cases)}  ", end="", file=sys.stderr, flush=True)
                for timed in measured:
                    if timed.kind in rows and case in timed.cases:
                        taken = rows[timed.kind].run_pass(1)
                        if repeat:
                            timed.passes.setdefault(case, []).append(taken)
    finally:
        print(file=sys.stderr)
        for row in rows.values():
            row.close()
    return measured


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one mesh, two sizes, single views, two passes")
    parser.add_argument("--repeats", type=int, help="passes of each case after the first; default 5, quick 2")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is not idle")
    parser.add_argument("--peer-python", help="interpreter with moderngl, open3d, drtk, pytorch3d, or some of them")
    parser.add_argument("--peer", action="append", default=[], help="only this peer; can be repeated")
    parser.add_argument("--face", type=Path, default=_FACE if _FACE.is_dir() else None, help="folder of a face asset")
    parser.add_argument("--cost", choices=("with", "only", "without"), default="with", help="the table of linear cost")
    parser.add_argument("--cuda", action="store_true", help="our CUDA backend against bare nvdiffrast calls instead")
    given = parser.parse_args()
    repeats = given.repeats or (2 if given.quick else 5)
    meshes = [face_mesh(given.face), ball_mesh(101, 130)][: 1 if given.quick else 2]
    sizes = SIZES_HW[: 2 if given.quick else 3]
    facts(given.peer_python)
    if given.cuda:
        from render_gpu import measure_cuda

        measure_cuda(meshes, sizes, repeats)
        return
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="render-benchmark-")))
        kinds = {"ours": [sys.executable]}
        if given.peer_python is not None:
            peers = given.peer or ["moderngl", "drtk", "open3d", "pytorch3d"]
            kinds |= {peer: [given.peer_python] for peer in peers}
        if given.cost != "only":
            cases = _cases(meshes, sizes, (1,) if given.quick else (1, VIEWS), scratch)
            measured = measure(kinds, cases, repeats, scratch)
            equality_table(measured)
            speed_table(measured, cases, given.clock)
        if given.cost != "without":
            balls = [ball_mesh(*size, radius) for size in _BALLS for radius in _RADII_MM]
            cases = [
                Case(write_scene(mesh, size, scratch), mesh.name, size, 1, backward=False)
                for mesh in balls
                for size in sizes[:2]
            ]
            (ours,) = measure({"ours": kinds["ours"]}, cases, repeats, scratch)
            cost_table(ours, given.clock)


def _cases(meshes: list[Mesh], sizes: tuple, batches: tuple[int, ...], scratch: Path) -> list[Case]:
    return [
        Case(write_scene(mesh, size, scratch), mesh.name, size, views, backward)
        for mesh in meshes
        for size in sizes
        for views in batches
        for backward in (False, True)
    ]


if __name__ == "__main__":
    main()
