"""Only better versions become champion, every decision is recorded, and promotions at once lose nothing."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import typer

from cluster.promote import PromoteRecipe, promote_command
from cluster.records import promotion, turns
from cluster.records.evaluations import EVALUATION_TAG
from cluster.records.promotion import CHAMPIONS_TAG, PromotionConfig, promote, rollback
from cluster.records.registry import RegistryError, registered_version
from cluster.records.tracking import KIND_TAG, PARENT_RUN_TAG, TrackingConfig, load_table, open_client
from lipflow.errors import ConfigError
from tests.cluster.records.versions import add_version, champion, driven, evaluate_version

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]

CRITERION = PromotionConfig()


@pytest.fixture(scope="module")
def config(tracking_config) -> TrackingConfig:
    return tracking_config


def history(config: TrackingConfig, name: str) -> list[str]:
    return json.loads(open_client(config).get_registered_model(name).tags[CHAMPIONS_TAG])


def test_better_ones_follow_the_first_and_worse_and_equal_ones_do_not(config):
    first = add_version(config, "gate", driven(100.0))
    decision = promote(config, CRITERION, name="gate")
    assert decision.promoted
    assert decision.champion_version is None

    for mse, words in ((110.0, "not measurably better"), (100.0, "(95 % interval 0.0000 dB to 0.0000 dB)")):
        refused = add_version(config, "gate", driven(mse))
        decision = promote(config, CRITERION, name="gate")
        assert not decision.promoted
        assert words in decision.reason
        assert (decision.candidate_version, decision.champion_version) == (refused, first)
        assert champion(config, "gate") == first

    better = add_version(config, "gate", driven(80.0))
    decision = promote(config, CRITERION, name="gate")
    assert decision.promoted
    assert champion(config, "gate") == better
    assert decision.gain is not None
    assert decision.gain.low == pytest.approx(10 * math.log10(1.25))
    again = promote(config, CRITERION, name="gate")
    assert not again.promoted
    assert again.reason == f"version {better} is the champion already"

    assert history(config, "gate") == [first, better]
    assert rollback(config, name="gate") == (better, first)
    assert champion(config, "gate") == first
    with pytest.raises(RegistryError, match="no earlier champion"):
        rollback(config, name="gate")


def test_every_decision_is_a_run_with_its_whole_table(config):
    add_version(config, "table", driven(100.0, image_mse_mouth=50.0))
    promote(config, CRITERION, name="table")
    candidate = add_version(config, "table", driven(80.0, image_mse_mouth=55.0))
    decision = promote(config, CRITERION, name="table")
    assert not decision.promoted
    assert "image error of mouth (hmc after 20 iterations" in decision.reason
    table = load_table(config, decision.run_id, "decision.json")
    # MLflow keeps ten decimals.
    assert table == [pytest.approx(asdict(row), abs=1e-10) for row in decision.rows]
    run = open_client(config).get_run(decision.run_id)
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert tags[KIND_TAG] == "promote"
    assert tags["lipflow.decision"] == "refused"
    assert tags["lipflow.reason"] == decision.reason
    assert tags["lipflow.model"] == f"table/{candidate}"
    assert PARENT_RUN_TAG in tags
    assert run.data.metrics["gain/low"] == pytest.approx(10 * math.log10(1.25))


def test_the_command_shows_the_table_and_json_has_all_of_it(config, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.uri)
    add_version(config, "shown", driven(100.0, image_mse_mouth=50.0))
    promote_command("models:/shown@challenger", set_=[])
    assert "promoted: there was no champion; fitted.psnr_db is 28.1308 dB" in capsys.readouterr().out
    add_version(config, "shown", driven(100.0, image_mse_mouth=60.0))
    with pytest.raises(typer.Exit):
        promote_command("models:/shown@challenger", set_=[])
    shown = capsys.readouterr().out
    assert "| hmc | 20 | train cameras, held-out expressions | image error | worse: mouth |" in shown
    assert "1.200 (1.200–1.200)" in shown
    assert "refused: not measurably better" in shown
    with pytest.raises(typer.Exit):
        promote_command("models:/shown@challenger", set_=[], as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert not document["promoted"]
    assert [row["ratio"] for row in document["rows"] if row["region"] == "mouth"] == [pytest.approx(1.2)]
    assert document["gain"]["mean"] == 0


def test_a_champion_that_was_evaluated_otherwise_is_refused_and_comparable_once_it_is_evaluated_again(config):
    held = add_version(config, "other", driven(100.0))
    promote(config, CRITERION, name="other")
    sheet = driven(80.0)
    other = {**vars(sheet), "shards_digest": "e" * 64}
    candidate = add_version(config, "other", type(sheet)(**other))
    decision = promote(config, CRITERION, name="other")
    assert not decision.promoted
    assert "different shard sets" in decision.reason
    assert "evaluate them again with one recipe on one shard set" in decision.reason
    assert champion(config, "other") == held
    evaluate_version(config, registered_version(f"models:/other/{candidate}", config), sheet)
    assert promote(config, CRITERION, name="other").promoted


def test_a_champion_without_scores_is_refused_with_the_remedy(config):
    held = add_version(config, "bare")
    open_client(config).set_registered_model_alias("bare", "champion", held)
    add_version(config, "bare", driven(80.0))
    decision = promote(config, CRITERION, name="bare")
    assert not decision.promoted
    assert f"run lipflow evaluate models:/bare/{held} SHARDS" in decision.reason


def test_what_cannot_be_judged_is_an_error_and_no_decision(config):
    add_version(config, "unmeasured")
    with pytest.raises(RegistryError, match="version 1 of model 'unmeasured' was not evaluated: run lipflow evaluate"):
        promote(config, CRITERION, name="unmeasured")
    with pytest.raises(RegistryError, match="no model 'absent'"):
        promote(config, CRITERION, name="absent")
    add_version(config, "unmeasured", driven(80.0))
    with pytest.raises(ConfigError, match=r"no scores for primary_metric frontal\.ssim"):
        promote(config, PromotionConfig(primary_metric="frontal.ssim"), name="unmeasured")
    client = open_client(config)
    client.set_model_version_tag("unmeasured", "2", EVALUATION_TAG, json.dumps({"run_id": "0" * 32} | {
        "shards_digest": "", "metrics": {}}))  # fmt: skip
    with pytest.raises(RegistryError, match=r"no evaluation/scores.json of run 0+: evaluate the avatar again"):
        promote(config, CRITERION, name="unmeasured")


def test_history_keeps_champions_that_were_set_by_hand_or_left_by_a_crash(config):
    versions = [add_version(config, "hand", driven(mse)) for mse in (100.0, 80.0, 60.0)]
    for version in versions[:2]:
        assert promote(config, CRITERION, candidate=version, name="hand").promoted
    open_client(config).set_registered_model_alias("hand", "champion", versions[0])
    assert promote(config, CRITERION, candidate=versions[2], name="hand").promoted
    assert history(config, "hand") == [versions[0], versions[1], versions[0], versions[2]]
    assert rollback(config, name="hand") == (versions[2], versions[0])


def test_a_champion_that_changed_meanwhile_is_judged_against(config, monkeypatch):
    """The other promotion comes between the judgement and the turn."""
    held, candidate, other = (add_version(config, "late", driven(mse)) for mse in (100.0, 80.0, 70.0))
    assert promote(config, CRITERION, candidate=held, name="late").promoted
    judged = []

    def judge_slowly(client, challenger, against, scores, criterion):
        judgement = genuine(client, challenger, against, scores, criterion)
        judged.append(against)
        if len(judged) == 1:
            monkeypatch.setattr(promotion, "_judge", genuine)
            assert promote(config, CRITERION, candidate=other, name="late").promoted
            monkeypatch.setattr(promotion, "_judge", judge_slowly)
        return judgement

    genuine = promotion._judge
    monkeypatch.setattr(promotion, "_judge", judge_slowly)
    decision = promote(config, CRITERION, candidate=candidate, name="late")
    assert judged == [held, other]
    assert not decision.promoted
    assert decision.champion_version == other
    assert history(config, "late") == [held, other]
    assert len(load_table(config, decision.run_id, "decision.json")) == len(decision.rows)


def test_an_alias_moved_by_hand_during_the_turn_is_told(config, monkeypatch):
    held, candidate = (add_version(config, "moved", driven(mse)) for mse in (100.0, 80.0))
    promote(config, CRITERION, candidate=held, name="moved")
    genuine = promotion._crown

    def crown_and_interfere(client, name, version, before):
        genuine(client, name, version, before)
        client.set_registered_model_alias(name, "champion", held)

    monkeypatch.setattr(promotion, "_crown", crown_and_interfere)
    decision = promote(config, CRITERION, candidate=candidate, name="moved")
    assert not decision.promoted
    assert f"the champion changed to version {held} while version {candidate} was promoted" in decision.reason
    tags = open_client(config).get_run(decision.run_id).data.tags
    assert (tags["lipflow.decision"], tags["lipflow.reason"]) == ("refused", decision.reason)


def test_a_turn_that_does_not_come_is_an_error(config, monkeypatch):
    add_version(config, "busy", driven(100.0))
    monkeypatch.setattr(turns, "LONGEST_WAIT_S", 0.1)
    with turns.turn_at(open_client(config), "busy"), pytest.raises(turns.TurnError, match="was not released within"):
        promote(config, CRITERION, name="busy")
    assert promote(config, CRITERION, name="busy").promoted


def test_recipes_name_the_gate_and_refuse_what_is_unknown():
    assert PromoteRecipe().criterion == PromotionConfig(primary_metric="fitted.psnr_db", guard_percent=5.0)
    with pytest.raises(ValueError, match="higher_is_better"):
        PromotionConfig(higher_is_better=True)
