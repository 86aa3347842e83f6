"""Tables are pure functions of score sheets: figures by hand, both protocols, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest

from cluster.compare import CompareRecipe, compare, named
from cluster.scores.protocols import tables
from cluster.scores.sheet import read_scores
from cluster.scores.tables import Key, Table, as_csv, as_markdown, variants_of
from lipflow.bootstrap import BootstrapInterval
from lipflow.errors import ConfigError
from tests.cluster.score_sheets import FRAMES, constant, scores_of, sheet_of


def _quadrant_scores(mse: float) -> list:
    frames = {"T/000001": mse, **constant(2 * mse)}
    rmse = dict.fromkeys(frames, 1.0)
    trained = scores_of("encoder", 0, frames, rmse)
    plain = scores_of("encoder", 0, {f: 4 * v for f, v in frames.items()}, rmse, cameras="held-out")
    solved = scores_of("encoder", 0, {f: 3 * v for f, v in frames.items()}, rmse, cameras="held-out", calibrated=True)
    return [*trained, *plain, *solved]


def _driven(name: str, at_0: float, at_10: float, rmse_mm: float):
    scores = scores_of("hmc", 0, constant(at_0), constant(rmse_mm))
    return sheet_of(name, [*scores, *scores_of("hmc", 10, constant(at_10), constant(rmse_mm / 2), fit_seconds=0.5)])


def _table(found: list[Table], name: str) -> Table:
    return next(table for table in found if table.name == name)


def _figures(table: Table) -> dict[tuple[str, ...], list[float | None]]:
    return {
        row.labels: [cell.mean if isinstance(cell, BootstrapInterval) else cell for cell in row.cells]
        for row in table.rows
    }


def test_psnr_is_that_of_the_mean_error_by_hand():
    """65.025 and 195.075 are 30 and 25.23 dB; their mean is 26.99 dB, and not the 27.61 of the mean PSNR."""
    mse = dict(zip(FRAMES, (65.025, 195.075, 65.025, 195.075), strict=True))
    (variant,) = variants_of([sheet_of("a", scores_of("hmc", 0, mse, constant(1.0)))])
    found = variant.psnr_db(Key("hmc"))
    assert found is not None
    assert found.mean == pytest.approx(10 * math.log10(65025 / 130.05))
    # The ends of the interval are those of the error, in the other order: all frames bad, all good.
    assert found.low == pytest.approx(10 * math.log10(65025 / 195.075))
    assert found.high == pytest.approx(30.0)


def test_multiface_tables_show_three_quadrants_and_the_training_one_apart():
    found = tables([sheet_of("base", _quadrant_scores(10.0)), sheet_of("warp", _quadrant_scores(5.0))], "multiface")
    assert [table.name for table in found] == ["quadrants", "training-quadrant", "quadrant-regions", "quadrant-ratios"]
    image_mse = {labels: cells[0] for labels, cells in _figures(_table(found, "quadrants")).items()}
    assert image_mse == {
        ("novel view", "calibrated", "base"): 30.0,
        ("novel view", "calibrated", "warp"): 15.0,
        ("novel view", "uncalibrated", "base"): 40.0,
        ("novel view", "uncalibrated", "warp"): 20.0,
        ("novel expression", "trained", "base"): 20.0,
        ("novel expression", "trained", "warp"): 10.0,
        ("both novel", "calibrated", "base"): 60.0,
        ("both novel", "calibrated", "warp"): 30.0,
        ("both novel", "uncalibrated", "base"): 80.0,
        ("both novel", "uncalibrated", "warp"): 40.0,
    }
    training = _figures(_table(found, "training-quadrant"))
    assert {labels[2]: cells[0] for labels, cells in training.items()} == {"base": 10.0, "warp": 5.0}
    ratios = _figures(_table(found, "quadrant-ratios"))
    assert {labels[2] for labels in ratios} == {"warp"}
    assert all(cells == pytest.approx([0.5, 1.0]) for cells in ratios.values())


def test_lipflow_table_is_signal_by_method_by_iterations_with_ratios_to_the_baselines_last():
    found = tables([_driven("dam", 100.0, 50.0, 2.0), _driven("flow", 60.0, 45.0, 1.0)], "lipflow")
    assert [table.name for table in found] == ["driven", "driven-regions", "driven-ratios"]
    assert [row.labels for row in found[0].rows] == [
        ("hmc", "dam", "0"),
        ("hmc", "dam", "10"),
        ("hmc", "flow", "0"),
        ("hmc", "flow", "10"),
    ]
    seconds = [cells[-1] for cells in _figures(found[0]).values()]
    assert seconds == pytest.approx([0, 0.5, 0, 0.5])
    ratios = _figures(_table(found, "driven-ratios"))
    assert ratios == {
        ("hmc", "dam", "0"): pytest.approx([2.0, 2.0]),
        ("hmc", "flow", "0"): pytest.approx([1.2, 1.0]),
        ("hmc", "flow", "10"): pytest.approx([0.9, 0.5]),
    }
    other = tables([_driven("dam", 100.0, 50.0, 2.0), _driven("flow", 60.0, 45.0, 1.0)], "lipflow", baseline="flow")
    assert ("hmc", "dam", "10") in _figures(_table(other, "driven-ratios"))


def test_jitter_is_over_the_targets_own_and_only_where_both_neighbours_were_scored():
    scores = scores_of("hmc", 0, constant(1.0), constant(1.0))
    scores[1] = replace(scores[1], jitter_mm=0.3, target_jitter_mm=0.2)
    scores[2] = replace(scores[2], jitter_mm=0.3, target_jitter_mm=0.1)
    (variant,) = variants_of([sheet_of("a", scores)])
    found = variant.jitter(Key("hmc"))
    assert found is not None
    assert (found.mean, found.frames) == pytest.approx((0.6 / 0.3, 2))


def test_sheets_of_one_name_are_seeds_and_averaged():
    sheets = [_driven("flow", 10.0, 8.0, 1.0), _driven("flow", 30.0, 12.0, 3.0)]
    (variant,) = variants_of(sheets)
    found = variant.mean(Key("hmc"), "image_mse")
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((20.0, 10.0, 30.0))
    (table, *_) = tables(sheets, "lipflow")
    assert len(table.rows) == 2
    assert "over 2 seeds" in table.note


def test_a_frame_that_one_seed_or_one_method_lacks_is_left_out_of_both():
    whole = sheet_of("a", scores_of("hmc", 0, dict(zip(FRAMES, (1.0, 2.0, 3.0, 4.0), strict=True)), constant(1.0)))
    lacking = sheet_of("a", scores_of("hmc", 0, dict(zip(FRAMES[:3], (1.0, 2.0, 3.0), strict=True)), constant(1.0)))
    (variant,) = variants_of([whole, lacking])
    assert variant.frames(Key("hmc"), "image_mse") == list(FRAMES[:3])
    first, second = variants_of([whole, replace(lacking, name="b")])
    found = first.ratio(Key("hmc"), "image_mse", second, Key("hmc"))
    assert found is not None
    assert (found.mean, found.low, found.high, found.frames) == pytest.approx((1, 1, 1, 3))


def test_intervals_resample_segments_only_where_there_are_enough_or_it_is_asked_for():
    sheet = _driven("a", 1.0, 1.0, 1.0)
    assert "over frames (4 held-out frames of 2 segments" in tables([sheet], "lipflow")[0].note
    assert "over segments, resampled whole (2 held-out" in tables([sheet], "lipflow", unit="segment")[0].note
    frames = tuple(f"S{index}/000001" for index in range(8))
    many = sheet_of("a", scores_of("hmc", 0, dict.fromkeys(frames, 1.0), dict.fromkeys(frames, 1.0)))
    assert "over segments" in tables([replace(many, held_out_frames=frames)], "lipflow")[0].note


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"shards_digest": "e" * 64}, "shard sets"),
        ({"held_out_frames": FRAMES[:3]}, "held-out frames"),
        ({"train_frames": ()}, "training frames"),
        ({"train_cameras": ("a",)}, "training cameras"),
        ({"held_out_cameras": ()}, "held-out cameras"),
        ({"calibration_segments": ("U",)}, "calibration segments"),
    ],
)
def test_scores_of_different_data_are_refused(changes, what):
    sheets = [_driven("a", 1.0, 1.0, 1.0), replace(_driven("b", 1.0, 1.0, 1.0), **changes)]
    with pytest.raises(ConfigError, match=f"a and b were scored on different {what}"):
        tables(sheets)
    with pytest.raises(ConfigError, match="different"):
        tables([replace(sheet, name="same") for sheet in sheets])


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ConfigError, match=r"baseline 'x' is none of the variants; choose from \['a'\]"):
        tables([_driven("a", 1.0, 1.0, 1.0)], baseline="x")


def test_markdown_and_csv_hold_the_figures_of_the_table():
    table = _table(tables([_driven("dam|1", 100.0, 50.0, 2.0)], "lipflow"), "driven")
    text = as_markdown(table)
    assert "| hmc | dam\\|1 | 10 | 50.00 (50.00–50.00) | 31.14 (31.14–31.14) |" in text
    rows = list(csv.DictReader(as_csv(table).splitlines()))
    assert [float(row["image MSE"]) for row in rows] == [100.0, 50.0]
    assert [float(row["geometry, mm high"]) for row in rows] == [2.0, 1.0]
    assert [row["texture MSE"] for row in rows] == ["", ""]


def test_compare_makes_the_same_tables_from_files_and_names_them_anew(tmp_path):
    sheets = [_driven("lipflow", 100.0, 50.0, 2.0), _driven("lipflow", 60.0, 45.0, 1.0)]
    for index, sheet in enumerate(sheets):
        (tmp_path / f"{index}").mkdir()
        (tmp_path / f"{index}" / "scores.json").write_text(sheet.to_json())
        assert read_scores(str(tmp_path / f"{index}")) == sheet
    out = tmp_path / "out"
    found = compare([f"dam={tmp_path}/0", f"flow={tmp_path}/1/scores.json"], str(out), CompareRecipe())
    assert list(found.tables) == tables([replace(sheets[0], name="dam"), replace(sheets[1], name="flow")])
    assert (out / "tables.md").read_text().startswith("### Driven by one signal")
    assert {path.name for path in (out / "tables").iterdir()} == {f"{table.name}.csv" for table in found.tables}
    document = json.loads((out / "evaluation.json").read_text())
    assert [table["name"] for table in document["tables"]] == [table.name for table in found.tables]
    page = (out / "report.html").read_text()
    assert "Errors over those of dam" in page
    assert "0.900 (0.900–0.900)" in page


def test_scores_that_are_none_are_refused(tmp_path):
    path = tmp_path / "scores.json"
    for text, message in (("[]", "format 1"), ("{", "not valid JSON"), ('{"format": 1}', "missing or unknown")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_scores(str(path))


def test_names_are_told_from_uris():
    assert named("dam=/a/b") == ("dam", "/a/b")
    assert named("dam=models:/lipflow@champion") == ("dam", "models:/lipflow@champion")
    assert named("/runs/x=1/avatar") == (None, "/runs/x=1/avatar")
    assert named("s3://bucket/x=1") == (None, "s3://bucket/x=1")
