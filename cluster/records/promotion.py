"""The gate to production: a candidate becomes the champion only if it was measured to be better.

:mod:`cluster.scores.gate` judges the scores of both versions' last evaluations, which must be of the same data. Every
decision, also a refusal, is a run of its own with its full table. Promotions at the same time take turns
(:mod:`cluster.records.turns`): the slow part, fetching and judging scores, is done without a turn, and if the champion
is another one when the turn has come, the candidate is judged again, against the new one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from cluster.records.evaluations import version_scores
from cluster.records.registry import CHALLENGER, CHAMPION, DEFAULT_NAME, RegistryError, find_version
from cluster.records.run import Run, store_errors
from cluster.records.tracking import MODEL_TAG, TrackingConfig, open_client, tracked_run
from cluster.records.turns import TurnError, turn_at
from cluster.scores.gate import Judgement, PromotionConfig, judge
from cluster.scores.gate_rows import GateRow
from cluster.scores.sheet import ScoreSheet
from lipflow.bootstrap import BootstrapInterval

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPIONS_TAG = "lipflow.champions"
"""Of the registered model: all champions, a JSON list of version numbers; rolling back takes the last one off."""
DECISION_TAG = "lipflow.decision"
REASON_TAG = "lipflow.reason"
DECISION_TABLE = "decision.json"

_TRIES = 20
"""Judgements of one promotion, if every time another one is quicker."""


@dataclass(frozen=True)
class PromotionDecision:
    """What was decided, and on what grounds.

    Attributes:
        promoted: whether the candidate became the champion by this decision.
        reason: one sentence for people.
        name: the registered model.
        candidate_version: that was judged.
        champion_version: that it was compared with; None if there was none.
        gain: of the primary metric, in its unit; None if nothing was compared.
        rows: the primary metric and all guards.
        note: what intervals are over.
        run_id: the run that recorded the decision.
    """

    promoted: bool
    reason: str
    name: str
    candidate_version: str
    champion_version: str | None
    gain: BootstrapInterval | None
    rows: tuple[GateRow, ...]
    note: str
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
        RegistryError: no such model or candidate, or a candidate that was never evaluated.
        ConfigError: it was not scored by the criterion's metric.
        TurnError: other promotions did not end.
    """
    client = open_client(config)
    challenger = find_version(client, name, candidate)
    version = str(challenger.version)
    scores = version_scores(client, challenger, f"version {version}")
    # What cannot be judged is an error and no decision.
    judge(scores, None, criterion)
    with (
        tracked_run(
            "promote",
            f"promote {name} {version}",
            config=config,
            recipe=criterion,
            tags={MODEL_TAG: f"{name}/{version}"},
            shards_digest=scores.shards_digest,
            parent_run=challenger.run_id,
        ) as run,
        store_errors(client.tracking_uri),
    ):
        for _ in range(_TRIES):
            champion = _champion(client, name)
            judgement = _judge(client, challenger, champion, scores, criterion)
            decided = _carried_out(client, run, name, version, champion, judgement)
            if decided is not None:
                break
        else:
            raise TurnError(f"the champion of {name!r} changed {_TRIES} times while version {version} was judged")
    return PromotionDecision(
        promoted=decided.passed,
        reason=decided.reason,
        name=name,
        candidate_version=version,
        champion_version=champion,
        gain=decided.gain,
        rows=decided.rows,
        note=decided.note,
        run_id=run.run_id,
    )


def rollback(config: TrackingConfig, *, name: str = DEFAULT_NAME) -> tuple[str, str]:
    """Give the alias ``champion`` back to the version that held it before; returns (from, to) version numbers.

    Raises:
        RegistryError: there is no champion, or none before it that still exists.
        TurnError: promotions did not end.
    """
    client = open_client(config)
    find_version(client, name, CHAMPION)
    with store_errors(client.tracking_uri), turn_at(client, name) as turn:
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
            tags={DECISION_TAG: "rolled back", MODEL_TAG: f"{name}/{earlier[-1]}"},
        ):
            turn.require()
            client.set_registered_model_alias(name, CHAMPION, earlier[-1])
            client.set_registered_model_tag(name, CHAMPIONS_TAG, json.dumps(earlier))
    return current, earlier[-1]


def _judge(
    client: MlflowClient, challenger: ModelVersion, champion: str | None, scores: ScoreSheet, criterion: PromotionConfig
) -> Judgement:
    if champion is None:
        return judge(scores, None, criterion)
    if champion == str(challenger.version):
        found = judge(scores, None, criterion)
        return replace(found, passed=False, reason=f"version {champion} is the champion already")
    try:
        held = version_scores(client, find_version(client, challenger.name, champion), f"champion {champion}")
    except RegistryError as error:
        found = judge(scores, None, criterion)
        return replace(found, passed=False, reason=f"champion {champion} cannot be compared with: {error}")
    return judge(scores, held, criterion)


def _carried_out(
    client: MlflowClient, run: Run, name: str, version: str, champion: str | None, judgement: Judgement
) -> Judgement | None:
    """Record what was judged, and crown a candidate that passed; None if it has to be judged again."""
    if not judgement.passed:
        _record(run, judgement)
        run.set_tags({DECISION_TAG: "refused"})
        return judgement
    with turn_at(client, name) as turn:
        if _champion(client, name) != champion:
            return None
        _record(run, judgement)
        turn.require()
        _crown(client, name, version, champion)
        holder = _champion(client, name)
        if holder != version:
            # Somebody who takes no turns: by hand, or after a stall longer than a turn.
            reason = f"the champion changed to version {holder} while version {version} was promoted: run it again"
            judgement = replace(judgement, passed=False, reason=reason)
            run.set_tags({REASON_TAG: reason})
    run.set_tags({DECISION_TAG: "promoted" if judgement.passed else "refused"})
    return judgement


def _record(run: Run, judgement: Judgement) -> None:
    run.log_table([asdict(row) for row in judgement.rows], DECISION_TABLE)
    run.set_tags({REASON_TAG: judgement.reason})
    if judgement.gain is not None:
        gain = judgement.gain
        run.log_metrics({"gain/mean": gain.mean, "gain/low": gain.low, "gain/high": gain.high})


def _crown(client: MlflowClient, name: str, version: str, champion: str | None) -> None:
    """The alias moves before the history is written: a crash in between leaves a champion that the next one appends."""
    history = _champions(client, name)
    client.set_registered_model_alias(name, CHAMPION, version)
    if champion is not None and history[-1:] != [champion]:
        # Set by hand, or left by a crash.
        history.append(champion)
    client.set_registered_model_tag(name, CHAMPIONS_TAG, json.dumps([*history, version]))


def _champion(client: MlflowClient, name: str) -> str | None:
    """The champion's version number."""
    aliases = client.get_registered_model(name).aliases
    return str(aliases[CHAMPION]) if CHAMPION in aliases else None


def _champions(client: MlflowClient, name: str) -> list[str]:
    return json.loads(client.get_registered_model(name).tags.get(CHAMPIONS_TAG, "[]"))


def _until(history: list[str], version: str) -> list[str]:
    """``history`` up to and with the last time that ``version`` was champion."""
    return history[: len(history) - history[::-1].index(version)]


__all__ = ["CHAMPIONS_TAG", "DECISION_TABLE", "PromotionConfig", "PromotionDecision", "promote", "rollback"]
