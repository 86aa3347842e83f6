"""Registered versions and runs are compared by the scores of their evaluations, without running anything again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.compare import CompareRecipe, called, compare, compare_command
from cluster.records.registry import registered_version
from cluster.records.tracking import TrackingConfig
from lipflow.errors import ConfigError
from tests.cluster.records.versions import add_version, driven, evaluate_version

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]


@pytest.fixture(scope="module")
def recipe(tracking_config: TrackingConfig) -> CompareRecipe:
    for mse in (100.0, 80.0):
        add_version(tracking_config, "compared", driven(mse))
    return CompareRecipe(tracking=tracking_config)


def ratios(comparison) -> dict[str, float]:
    """Variant -> its image error over the baseline's."""
    table = next(table for table in comparison.tables if table.name == "driven-ratios")
    return {row.labels[1]: row.cells[0].mean for row in table.rows}


def test_versions_and_runs_give_the_tables_of_their_files(recipe, tmp_path: Path):
    for number, mse in enumerate((100.0, 80.0), 1):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "scores.json").write_text(driven(mse).to_json())
    run = registered_version("models:/compared/2", recipe.tracking).run_id
    uris = ("models:/compared/2", "models:/compared@challenger", f"runs:/{run}", str(tmp_path / "2"))
    for uri in uris:
        comparison = compare(["old=models:/compared/1", f"new={uri}"], None, recipe)
        assert ratios(comparison) == {"new": pytest.approx(0.8)}, uri
    from_files = compare([f"old={tmp_path / '1'}", f"new={tmp_path / '2'}"], None, recipe)
    assert from_files.markdown() == comparison.markdown()


def test_what_is_not_named_is_called_by_its_address(recipe, tmp_path: Path):
    comparison = compare(["models:/compared/1", "models:/compared@challenger"], str(tmp_path), recipe)
    assert ratios(comparison) == {"compared@challenger": pytest.approx(0.8)}
    assert "compared-1" in (tmp_path / "tables.md").read_text()
    assert called("runs:/0123") == "0123"
    assert called("s3://runs/base/avatar") == "base"


def test_scores_of_other_data_are_refused(recipe):
    number = add_version(recipe.tracking, "elsewhere")
    version = registered_version(f"models:/elsewhere/{number}", recipe.tracking)
    evaluate_version(recipe.tracking, version, replace(driven(80.0), shards_digest="e" * 64))
    with pytest.raises(ConfigError, match="were scored on different shard sets"):
        compare(["models:/compared/1", "models:/elsewhere/1"], None, recipe)


def test_the_command_needs_no_place_for_its_tables(recipe, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recipe.tracking.uri or "")
    compare_command(["models:/compared/1", "models:/compared/2"])
    shown = capsys.readouterr().out
    assert "| hmc | compared-2 | 20 | 0.800 (0.800–0.800) |" in shown
    assert "report:" not in shown
    compare_command(["models:/compared/1", "models:/compared/2"], as_json=True)
    assert {variant["name"] for variant in json.loads(capsys.readouterr().out)["variants"]} == {
        "compared-1",
        "compared-2",
    }
