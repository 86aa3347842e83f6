"""The gate to production: a candidate becomes the champion only if it was measured to be better.

Both must have been evaluated on the same frozen shard set; numbers from different data are never compared. Every
decision, also a refusal, is a run of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cluster.records.registry import CHALLENGER, CHAMPION, DEFAULT_NAME, RegistryError, evaluation_metrics, find_version
from cluster.records.tracking import SHARDS_DIGEST_TAG, TrackingConfig, open_client, tracked_run
from lipflow.config import StrictConfig

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPIONS_TAG = "lipflow.champions"
DECISION_TABLE = "decision.json"


class PromotionConfig(StrictConfig):
    """What "better" means.

    Attributes:
        primary_metric: the one that decides.
        higher_is_better: its direction.
        minimum_gain: by how much the candidate must win, in the metric's unit; winning by exactly nothing never
            suffices.
    """

    primary_metric: str
    higher_is_better: bool
    minimum_gain: float = 0.0


@dataclass(frozen=True)
class MetricComparison:
    """One metric of both versions; None where a version lacks it."""

    metric: str
    candidate: float | None
    champion: float | None
    decides: bool


@dataclass(frozen=True)
class PromotionDecision:
    """What was decided, and on what grounds.

    Attributes:
        promoted: whether the candidate is the champion now because of this decision.
        reason: one sentence for people.
        name: the registered model.
        candidate_version: that was judged.
        champion_version: that it was compared with; None if there was none.
        comparisons: all metrics of both.
        run_id: the run that recorded the decision.
    """

    promoted: bool
    reason: str
    name: str
    candidate_version: str
    champion_version: str | None
    comparisons: tuple[MetricComparison, ...]
    run_id: str


def promote(
    config: TrackingConfig,
    criterion: PromotionConfig,
    *,
    candidate: str = CHALLENGER,
    name: str = DEFAULT_NAME,
) -> PromotionDecision:
    """Move the alias ``champion`` to a candidate that is better than its holder, and record the decision.

    Args:
        config: the store.
        criterion: what better means.
        candidate: a version number or an alias.
        name: the registered model.

    Raises:
        RegistryError: no such model or candidate, or the candidate was never evaluated by the criterion's metric.
    """
    client = open_client(config)
    challenger = find_version(client, name, candidate)
    champion = _champion(client, name)
    _require_metric(challenger, criterion)
    promoted, reason = _judge(challenger, champion, criterion)
    comparisons = _compare(challenger, champion, criterion)
    tags = {
        "lipflow.decision": "promoted" if promoted else "refused",
        "lipflow.reason": reason,
        "lipflow.model": f"{name}/{challenger.version}",
    }
    with tracked_run(
        "promote",
        f"promote {name} {challenger.version}",
        config=config,
        recipe=criterion,
        tags=tags,
        shards_digest=challenger.tags.get(SHARDS_DIGEST_TAG),
        parent_run=challenger.run_id,
    ) as run:
        run.log_table([asdict(comparison) for comparison in comparisons], DECISION_TABLE)
        if promoted:
            _crown(client, name, str(challenger.version), champion)
    return PromotionDecision(
        promoted,
        reason,
        name,
        str(challenger.version),
        None if champion is None else str(champion.version),
        comparisons,
        run.run_id,
    )


def rollback(config: TrackingConfig, *, name: str = DEFAULT_NAME) -> tuple[str, str]:
    """Give the alias ``champion`` back to the version that held it before; returns (from, to) version numbers.

    Raises:
        RegistryError: there is no champion, or none before it that still exists.
    """
    client = open_client(config)
    current = str(find_version(client, name, CHAMPION).version)
    history = _champions(client, name)
    earlier = _until(history, current)[:-1] if current in history else history
    existing = {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}
    earlier = [version for version in earlier if version in existing and version != current]
    if not earlier:
        raise RegistryError(
            f"champion {current} of model {name!r} has no earlier champion to go back to: "
            "promote another version instead"
        )
    with tracked_run(
        "promote",
        f"roll back {name} {current} to {earlier[-1]}",
        config=config,
        tags={"lipflow.decision": "rolled back", "lipflow.model": f"{name}/{earlier[-1]}"},
    ):
        client.set_registered_model_alias(name, CHAMPION, earlier[-1])
        client.set_registered_model_tag(name, CHAMPIONS_TAG, json.dumps(earlier))
    return current, earlier[-1]


def _judge(challenger: ModelVersion, champion: ModelVersion | None, criterion: PromotionConfig) -> tuple[bool, str]:
    metric = criterion.primary_metric
    value = evaluation_metrics(challenger)[metric]
    if not math.isfinite(value):
        return False, f"{metric} of version {challenger.version} is {value}, which is no measurement"
    if champion is None:
        return True, f"there was no champion; {metric} is {value:.6g}"
    if str(champion.version) == str(challenger.version):
        return False, f"version {champion.version} is the champion already"
    digests = [version.tags.get(SHARDS_DIGEST_TAG) for version in (challenger, champion)]
    if digests[0] is None or digests[0] != digests[1]:
        return False, (
            f"version {challenger.version} was evaluated on the shard set {_short(digests[0])} and champion "
            f"{champion.version} on {_short(digests[1])}: evaluate both on the same one"
        )
    held = evaluation_metrics(champion).get(metric)
    if held is None:
        return False, f"champion {champion.version} was not evaluated by {metric}: evaluate it first"
    gain = value - held if criterion.higher_is_better else held - value
    verdict = f"{metric} {value:.6g} against {held:.6g} of champion {champion.version}"
    if math.isfinite(held) and not (gain > 0 and gain >= criterion.minimum_gain):
        needed = f" by at least {criterion.minimum_gain:g}" if criterion.minimum_gain else ""
        return False, f"not better{needed}: {verdict}"
    return True, f"better: {verdict}"


def _compare(
    challenger: ModelVersion, champion: ModelVersion | None, criterion: PromotionConfig
) -> tuple[MetricComparison, ...]:
    ours = evaluation_metrics(challenger)
    theirs = {} if champion is None else evaluation_metrics(champion)
    return tuple(
        MetricComparison(name, ours.get(name), theirs.get(name), decides=name == criterion.primary_metric)
        for name in sorted(ours.keys() | theirs.keys())
    )


def _require_metric(version: ModelVersion, criterion: PromotionConfig) -> None:
    metrics = evaluation_metrics(version)
    if criterion.primary_metric not in metrics:
        raise RegistryError(
            f"version {version.version} of model {version.name!r} has no metric {criterion.primary_metric!r}, "
            f"it has {sorted(metrics)}: evaluate it first, or choose one of those as primary_metric"
        )


def _crown(client: MlflowClient, name: str, version: str, champion: ModelVersion | None) -> None:
    """The history is written before the alias moves: a crash in between leaves a valid champion."""
    history = _champions(client, name)
    if champion is not None:
        current = str(champion.version)
        # Also for a champion that somebody set by hand.
        history = _until(history, current) if current in history else [*history, current]
    client.set_registered_model_tag(name, CHAMPIONS_TAG, json.dumps([*history, version]))
    client.set_registered_model_alias(name, CHAMPION, version)


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    return find_version(client, name, CHAMPION) if CHAMPION in client.get_registered_model(name).aliases else None


def _champions(client: MlflowClient, name: str) -> list[str]:
    return json.loads(client.get_registered_model(name).tags.get(CHAMPIONS_TAG, "[]"))


def _until(history: list[str], version: str) -> list[str]:
    """``history`` up to and with the last time that ``version`` was champion."""
    return history[: len(history) - history[::-1].index(version)]


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
