"""The model card of a version: what it is, what it was made of, where it departs from the papers, how it was measured.

It is ``README.md`` in the packaged model and the version's description in the registry. What was measured comes last
and is replaced by each evaluation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.records.redaction import redact_text
from lipflow.config import AvatarConfig

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from pipeline.loading.loader import ShardSet

CARD_FILE = "README.md"
MODEL_FOLDER = "avatar"
LONGEST_DESCRIPTION = 5000
"""Characters; MLflow's databases hold no more."""

_EVALUATION = "## Evaluation"
_DEVIATIONS = """\
Of this implementation from *LiP-Flow* (Aksan et al., 2022) and *Multiface* (Wuu et al., 2022):

- One avatar has several drivers: headset views, frontal image and landmarks share z, decoder and flow, are trained
  together, and are fused as a product of Gaussians.
- The latent term is a single-sample estimate of KL(Q || P) with Q's analytic entropy, unless the recipe says
  `latent_estimate: likelihood`.
- The fit weighs the prior by its density of y = f(z), which is highest at the driver's own answer, unless
  `fit.density` says otherwise.
- Rendering is perspective-correct (w = z); the public Multiface code sets w = 1. Scores take four samples a pixel.
- The texture encoder ends at 4 x 4, as the public code does; the text's 2 x 2 does not fit its eight halvings.
- Driving signals that a capture lacks are rendered from its tracked mesh and texture, not recorded.
- A held-out camera's colours are solved on declared training segments; nothing is fitted on what is scored.
"""
_LICENCE = """\
The code is under Apache-2.0. The weights follow from the captures named above and inherit their conditions: those of
Multiface and Ava-256 are CC BY-NC 4.0. The avatar shows a person: use it only as far as that person has agreed to.
"""


@dataclass(frozen=True)
class TrainingData:
    """What an avatar was trained on.

    Attributes:
        uri: of the shard set.
        digest: of the shard set.
        captures: where they lay.
        splits: split -> (segments, frames).
        train_cameras: how many.
        held_out_cameras: how many.
    """

    uri: str
    digest: str
    captures: tuple[str, ...]
    splits: dict[str, tuple[int, int]]
    train_cameras: int
    held_out_cameras: int

    @classmethod
    def of(cls, shards: ShardSet) -> TrainingData:
        """The facts of a shard set."""
        frames = {split: shards.frame_ids(split) for split in ("train", "val", "test")}
        return cls(
            uri=shards.uri,
            digest=shards.digest,
            captures=tuple(capture.uri for capture in shards.manifest.captures),
            splits={split: (len({frame.split("/")[0] for frame in ids}), len(ids)) for split, ids in frames.items()},
            train_cameras=len(shards.train_camera_ids),
            held_out_cameras=len(shards.test_camera_ids),
        )


def model_card(
    name: str, config: AvatarConfig, signals: tuple[str, ...], digest: str, data: TrainingData | None
) -> str:
    """The card of a version that was not evaluated yet, in Markdown, without secrets."""
    changed = config.model_dump(mode="json", exclude_defaults=True)
    settings = {key: value for key, value in changed.items() if key != "method"}
    text = (
        f"# {name}: a driven face avatar\n\n"
        f"Method `{config.method}`, driven by {', '.join(signals)}. Driving signals in, vertices, textures and their "
        "uncertainty out:\n\n"
        f'```python\nmodel = mlflow.pyfunc.load_model("models:/{name}@champion")\n```\n\n'
        f"## Data\n\n{_data(digest, data)}\n"
        f"## Method\n\nSettings other than the defaults: `{json.dumps(settings)}`. The whole recipe is `recipe.json` "
        f"of the training run.\n\n"
        f"## Deviations\n\n{_DEVIATIONS}\n## Licence\n\n{_LICENCE}\n{_EVALUATION}\n\nNot evaluated yet.\n"
    )
    return redact_text(text)


def with_evaluation(card: str, run_id: str, digest: str, metrics: Mapping[str, float]) -> str:
    """The card with these measurements instead of those that it holds."""
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in sorted(metrics.items(), key=_fitted_first))
    kept = card.partition(_EVALUATION)[0].rstrip()
    section = (
        f"{_EVALUATION}\n\nMeasured by run {run_id} on the shard set `{digest}`; scores and latents are artifacts of "
        f"that run.\n\n| metric | value |\n|---|---:|\n{rows}\n"
    )
    return f"{kept}\n\n{section}" if kept else section


def update_card(
    client: MlflowClient, name: str, version: str, run_id: str, digest: str, metrics: Mapping[str, float]
) -> None:
    """Put measurements on a version's card, in its description and, where it has one, in its ``README.md``."""
    found = client.get_model_version(name, version)
    place = f"{MODEL_FOLDER}/{CARD_FILE}"
    card = found.description or ""
    if found.run_id and place in {item.path for item in client.list_artifacts(found.run_id, MODEL_FOLDER)}:
        with tempfile.TemporaryDirectory() as folder:
            card = Path(client.download_artifacts(found.run_id, place, folder)).read_text()
        client.log_text(found.run_id, with_evaluation(card, run_id, digest, metrics), place)
    client.update_model_version(name, version, description=shortened(with_evaluation(card, run_id, digest, metrics)))


def shortened(card: str) -> str:
    """As much of the card as a description holds."""
    if len(card) <= LONGEST_DESCRIPTION:
        return card
    note = f"\n… the rest stands in {CARD_FILE} of the model."
    return card[: LONGEST_DESCRIPTION - len(note)].rpartition("\n")[0] + note


def _data(digest: str, data: TrainingData | None) -> str:
    if data is None:
        return f"Shard set `{digest}`.\n"
    splits = ", ".join(f"{split} {frames} of {segments} segments" for split, (segments, frames) in data.splits.items())
    return (
        f"- shard set {data.uri}, digest `{data.digest}`\n"
        f"- captures: {', '.join(data.captures)}\n"
        f"- frames: {splits}\n"
        f"- cameras: {data.train_cameras} for training, {data.held_out_cameras} held out\n"
    )


def _fitted_first(item: tuple[str, float]) -> tuple[bool, str]:
    return not item[0].startswith("fitted."), item[0]


__all__ = ["CARD_FILE", "TrainingData", "model_card", "shortened", "update_card", "with_evaluation"]
