"""A version's one tag leads to its evaluation's scores, from which it is compared without running anything."""

from __future__ import annotations

import pytest

from cluster.records.card import LONGEST_DESCRIPTION, shortened, with_evaluation
from cluster.records.evaluations import find_scores, record_evaluation, recorded_evaluation
from cluster.records.registry import RegistryError, find_version, registered_version
from cluster.records.tracking import TrackingConfig, open_client, tracked_run
from tests.cluster.records.versions import add_version, driven, evaluate_version

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]


@pytest.fixture(scope="module")
def config(tracking_config) -> TrackingConfig:
    return tracking_config


@pytest.fixture(scope="module")
def version(config):
    return registered_version(f"models:/scored/{add_version(config, 'scored', driven(100.0))}", config)


def test_every_way_to_name_an_evaluation_gives_its_scores(config, version):
    newest = evaluate_version(config, version, driven(90.0))
    for uri in ("models:/scored/1", "models:/scored@challenger", f"runs:/{newest}", f"runs:/{version.run_id}"):
        sheet = find_scores(uri, config)
        assert sheet.scores == driven(90.0).scores, uri
    assert find_scores("models:/scored/1", config).name == "scored/1"
    assert find_scores("models:/scored/1", config, "mine").name == "mine"


def test_an_evaluation_replaces_the_last_one_in_one_write(config, version, monkeypatch):
    """A crash right after any request leaves one of the two, whole."""
    client = open_client(config)
    before = recorded_evaluation(find_version(client, "scored", "1"))
    written = []
    with tracked_run("evaluate", "evaluate", config=config) as run:
        genuine = run.client.set_model_version_tag

        def write_and_crash(*arguments):
            genuine(*arguments)
            written.append(arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(run.client, "set_model_version_tag", write_and_crash)
        with pytest.raises(KeyboardInterrupt):
            record_evaluation(version, run, metrics={"only": 1.0}, shards_digest="new")
    after = recorded_evaluation(find_version(client, "scored", "1"))
    assert len(written) == 1
    assert before is not None
    assert before.metrics.keys() == {"fitted.geometry_rmse_mm"}
    assert after is not None
    assert (after.run_id, after.shards_digest, after.metrics) == (run.run_id, "new", {"only": 1.0})


def test_what_was_not_evaluated_says_how_to(config):
    number = add_version(config, "raw")
    raw = registered_version(f"models:/raw/{number}", config)
    with pytest.raises(RegistryError, match="was not evaluated: run lipflow evaluate models:/raw/1 SHARDS"):
        find_scores("models:/raw@challenger", config)
    with pytest.raises(RegistryError, match="is no evaluation, and none grew out of it"):
        find_scores(f"runs:/{raw.run_id}", config)
    with pytest.raises(RegistryError, match="not found"):
        find_scores("runs:/" + "0" * 32, config)


def test_the_description_shows_the_last_evaluation_only(config, version):
    client = open_client(config)
    evaluate_version(config, version, driven(100.0, 2.5))
    run_id = evaluate_version(config, version, driven(100.0, 1.5))
    text = client.get_model_version("scored", "1").description
    assert "| fitted.geometry_rmse_mm | 1.5 |" in text
    assert run_id in text
    assert "2.5" not in text


def test_a_card_too_long_for_a_description_says_where_the_rest_is():
    card = with_evaluation("# card\n", "run", "digest", {f"metric.{number}": 1.0 for number in range(500)})
    short = shortened(card)
    assert len(card) > LONGEST_DESCRIPTION >= len(short)
    assert short.endswith("the rest stands in README.md of the model.")
    assert shortened("# card") == "# card"
