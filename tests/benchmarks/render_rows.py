"""A renderer's end of ``render.py``: ``render_rows.py KIND CASES CHECK`` serves one case a pass, in turn.

``KIND`` is ``ours`` or one of :mod:`render_peers`. Imports nothing of this project unless it is ``ours``, so that it
runs in the peers' environment. All kinds do the same work for each view: triangle ids, perspective-correct texture
coordinates, depth, and a bilinearly textured float32 picture, in memory of the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timed_rows import serve

PASS_S = 0.3
"""A pass repeats its case until this time is over, at least once."""


def renderer(kind: str, scene: dict[str, np.ndarray], views: int, backward: bool) -> Callable[[], dict]:
    """A function that draws a batch, and returns ``ids (N, H, W)`` and ``image (N, 3, H, W)``."""
    if kind == "ours":
        return _ours(scene, views, backward)
    import render_peers

    return render_peers.PEERS[kind](scene, views, backward)


def _ours(scene: dict[str, np.ndarray], views: int, backward: bool) -> Callable[[], dict]:
    import torch

    from lipflow.render.renderer import Renderer
    from lipflow.types import CameraTensors, Topology

    torch.set_num_threads(1)
    topology = Topology(
        scene["faces"], scene["uvs"], scene["uv_faces"], np.ones((8, 8), np.float32), {}, len(scene["vertices"])
    )
    drawer = Renderer(topology)
    vertices = torch.from_numpy(scene["vertices"])[None].requires_grad_(backward)
    texture = torch.from_numpy(scene["texture"])[None, None].requires_grad_(backward)
    cameras = CameraTensors(*(torch.from_numpy(scene[name])[None, :views] for name in ("intrinsics", "cam_from_head")))
    height, width = (int(extent) for extent in scene["size_hw"])

    def draw() -> dict:
        out = drawer.render(vertices, texture, cameras, (height, width))
        if backward:
            vertices.grad = texture.grad = None
            out.image.square().mean().backward()
        return {"ids": out.triangle_id[0], "image": out.image[0]}

    return draw


def main() -> None:
    """Serve the cases in turn; before that, write what the first of them looks like."""
    kind, cases_path, check = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    cases = json.loads(cases_path.read_text())
    scenes: dict[str, dict[str, np.ndarray]] = {}

    def make(case: dict) -> Callable[[], dict]:
        if case["scene"] not in scenes:
            with np.load(case["scene"], allow_pickle=False) as stored:
                scenes[case["scene"]] = dict(stored)
        return renderer(kind, scenes[case["scene"]], case["views"], case["backward"])

    shown = make(cases[0] | {"backward": False})()
    np.savez(check, ids=np.asarray(shown["ids"][0], np.int64), image=np.asarray(shown["image"][0], np.float32))
    turn = 0
    drawers: dict[int, Callable[[], dict]] = {}

    def run_pass(workers: int) -> int:
        nonlocal turn
        number, turn = turn % len(cases), turn + 1
        case, drawn = cases[number], 0
        if number not in drawers:  # in the first round, which does not count
            drawers[number] = make(case)
        draw = drawers[number]
        end = time.perf_counter() + PASS_S
        while not drawn or time.perf_counter() < end:
            draw()
            drawn += case["views"]
        return drawn

    serve(run_pass)


if __name__ == "__main__":
    main()
