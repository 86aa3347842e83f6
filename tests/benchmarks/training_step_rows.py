"""A checkout's end of ``training_step.py``: ``training_step_rows.py TREE SHARDS METHOD OPTIONS``, one part a pass.

The parts are what a training step calls, one after the other in the order of :data:`PARTS`, each with its backward
pass, on inputs that are cut off from each other; the last one is the step itself. The modules come from ``TREE``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from timed_rows import serve

PARTS = ("encode", "hmc", "frontal", "keypoints", "flow", "decode", "colour", "render", "clip", "optimiser", "step")
PASS_S = 0.4
"""A pass repeats its part until this time is over."""


def parts(shards_uri: str, method: str, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Name to a function that does the part once; parts that the method lacks are left out.

    Args:
        shards_uri: of a shard set whose training frames fill the batch.
        method: of ``AvatarConfig``.
        options: ``frames`` and ``views`` of the batch, ``threads``, ``antialias``, and ``avatar``, fields of
            ``AvatarConfig.small``.
    """
    import torch

    from cluster.scores.scene import context_of
    from lipflow.config import AvatarConfig, LossConfig
    from lipflow.losses import training_loss
    from lipflow.model.avatar import Avatar
    from lipflow.render.renderer import Renderer
    from lipflow.types import map_tensors
    from pipeline.loading.loader import ShardSet

    torch.set_num_threads(options["threads"])
    shards = ShardSet.open(shards_uri)
    avatar = Avatar(
        AvatarConfig.small(**{"method": method, "texture_size": 128} | options["avatar"]), context_of(shards)
    )
    renderer = Renderer(shards.topology, antialias=options["antialias"])
    frame_ids = shards.frame_ids("train")
    chosen = frame_ids[:: max(1, len(frame_ids) // options["frames"])][: options["frames"]]
    batch = shards.frames(chosen, shards.train_camera_ids[: options["views"]])
    avatar.measure_driving(batch.driving)
    generator = torch.Generator().manual_seed(0)
    loss_config = LossConfig()
    parameters = list(avatar.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-4, fused=True)
    # As in the step: what Q and one driven prior say is decoded and rendered together.
    rounds = 1 if method == "dam" else 2
    cameras = map_tensors(batch.cameras, lambda tensor: tensor.repeat(rounds, *[1] * (tensor.ndim - 1)))
    camera_index = batch.camera_index.repeat(rounds, 1)
    with torch.no_grad():
        z = avatar.encode(batch.vertices, batch.average_texture).mean.repeat(rounds, 1)
        decoded = avatar.decode(z, cameras.view_vectors())
        priors = {signal: avatar.prior(signal, batch.driving) for signal in avatar.signals}

    def backward(*outputs: torch.Tensor) -> None:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_()

    def step() -> None:
        optimizer.zero_grad()
        training_loss(avatar, renderer, batch, loss_config, generator).total.backward()
        clip()
        optimizer.step()

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    def encode() -> None:
        posterior = avatar.encode(batch.vertices, batch.average_texture)
        backward(posterior.mean, posterior.log_std)

    def drive(signal: str) -> Callable[[], None]:
        def run() -> None:
            prior = avatar.prior(signal, batch.driving, generator)
            backward(prior.mean, prior.log_std)

        return run

    def flow() -> None:
        prior = next(iter(priors.values()))
        backward(avatar.log_prior(leaf(z[: len(chosen)]), prior), avatar.start(prior))

    def decode() -> None:
        result = avatar.decode(leaf(z), cameras.view_vectors())
        backward(result.vertices, result.textures)

    def colour() -> None:
        backward(avatar.correct_color(leaf(decoded.textures), camera_index))

    def render() -> None:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        backward(renderer.render(leaf(decoded.vertices), leaf(decoded.textures), cameras, size).image)

    step()  # leaves gradients for the parts that take them
    run = {"encode": encode, "decode": decode, "colour": colour, "render": render, "clip": clip}
    run |= {signal: drive(signal) for signal in priors}
    run |= {"flow": flow} if method == "lipflow" else {}
    run |= {"optimiser": optimizer.step, "step": step}
    return {name: run[name] for name in PARTS if name in run}


def main() -> None:
    """Serve the parts in turn; the first line that is answered names them."""
    tree, shards_uri, method, options = sys.argv[1:]
    sys.path.insert(0, tree)
    import lipflow

    found = Path(lipflow.__file__).resolve().parents[1]
    if found != Path(tree).resolve():
        sys.exit(f"lipflow was imported from {found}, expected {tree}")
    turns: Iterator[Callable[[], Any]] = cycle(parts(shards_uri, method, json.loads(options)).values())

    def run_pass(workers: int) -> int:
        del workers  # threads are an option
        part, done = next(turns), 0
        end = time.perf_counter() + PASS_S
        while not done or time.perf_counter() < end:
            part()
            done += 1
        return done

    serve(run_pass)


if __name__ == "__main__":
    main()
