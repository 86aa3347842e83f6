"""The gate promotes what was measured to be better, and nothing else; every figure here is computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from pydantic import ValidationError

from cluster.scores.gate import FEWEST_UNITS, PromotionConfig, decision_table, judge
from cluster.scores.sheet import ScoreSheet
from cluster.scores.tables import as_markdown
from lipflow.bootstrap import bootstrap_ratio
from lipflow.errors import ConfigError
from tests.cluster.score_sheets import scores_of, sheet_of

FRAMES = tuple(f"S/{number:06d}" for number in range(8))
GEOMETRY = PromotionConfig(primary_metric="hmc.geometry_rmse_mm")


def driven(
    name: str, mse: list[float] | float = 100.0, rmse_mm: list[float] | float = 1.0, *, signal: str = "hmc", **others
) -> ScoreSheet:
    """Eight held-out frames, driven by one signal, after 20 iterations."""
    tables = [value if isinstance(value, list) else [value] * len(FRAMES) for value in (mse, rmse_mm)]
    rows = scores_of(signal, 20, *(dict(zip(FRAMES, table, strict=True)) for table in tables), **others)
    return sheet_of(name, rows, held_out_frames=FRAMES)


def joined(*sheets: ScoreSheet) -> ScoreSheet:
    return replace(sheets[0], scores=tuple(score for sheet in sheets for score in sheet.scores))


def test_better_on_average_and_not_surely_is_refused_with_the_interval():
    """Half the frames gain 0.5 mm and half lose 0.3: k of 8 drawn gainers gain 0.1 k - 0.3 mm.

    k is binomial with P(k <= 0) = 0.4 %, P(k <= 1) = 3.5 %: the 2.5 % quantile is at k = 1, the 97.5 % one at k = 7.
    """
    judgement = judge(driven("new", rmse_mm=[0.5] * 4 + [1.3] * 4), driven("held"), GEOMETRY)
    assert not judgement.passed
    assert judgement.gain is not None
    assert (judgement.gain.mean, judgement.gain.low, judgement.gain.high) == pytest.approx((0.1, -0.2, 0.4))
    assert "a gain of 0.1000 mm (95 % interval -0.2000 mm to 0.4000 mm)" in judgement.reason
    assert judgement.rows[0].verdict == "not better"
    assert (judgement.rows[0].ratio, judgement.rows[0].low, judgement.rows[0].high) == pytest.approx((0.9, 0.6, 1.2))


def test_a_sure_gain_passes_and_an_equal_or_a_worse_candidate_does_not():
    held = driven("held", rmse_mm=[0.5, 2.0] * 4)
    better, equal, worse = (
        judge(driven("new", rmse_mm=[0.5 * factor, 2.0 * factor] * 4), held, GEOMETRY) for factor in (0.8, 1.0, 1.25)
    )
    assert better.passed
    assert better.gain is not None
    # The frames' own spread does not cancel in a difference, and does in the ratio.
    assert 0.1 < better.gain.low < better.gain.mean == pytest.approx(0.25)
    assert (better.rows[0].low, better.rows[0].high) == pytest.approx((0.8, 0.8))
    assert not equal.passed
    assert "a gain of 0.0000 mm (95 % interval 0.0000 mm to 0.0000 mm)" in equal.reason
    assert not worse.passed
    assert worse.gain is not None
    assert worse.gain.high < 0


def test_the_low_end_of_the_gain_must_exceed_the_minimum():
    pair = driven("new", rmse_mm=0.8), driven("held")
    assert judge(*pair, GEOMETRY.model_copy(update={"minimum_gain": 0.19})).passed
    refused = judge(*pair, GEOMETRY.model_copy(update={"minimum_gain": 0.21}))
    assert not refused.passed
    assert "not measurably better by more than 0.2100 mm" in refused.reason


def test_fitted_psnr_is_the_mean_over_signals_of_the_psnr_of_the_mean_error():
    """100 to 50 is 3.0103 dB, 100 to 80 is 0.9691 dB."""
    new = joined(driven("new", 50.0), driven("new", 80.0, signal="keypoints"))
    held = joined(driven("held"), driven("held", signal="keypoints"))
    judgement = judge(new, held, PromotionConfig())
    assert judgement.passed
    assert judgement.gain is not None
    assert judgement.gain.mean == pytest.approx((10 * math.log10(2) + 10 * math.log10(1.25)) / 2, abs=1e-9)
    first = judgement.rows[0]
    assert first.champion == pytest.approx(10 * math.log10(255**2 / 100))
    assert first.ratio == pytest.approx(math.sqrt(0.5 * 0.8))


def test_ssim_is_better_when_higher_and_guarded_as_an_error():
    new, held = driven("new", ssim=0.95), driven("held", ssim=0.9)
    criterion = PromotionConfig(primary_metric="hmc.ssim")
    assert judge(new, held, criterion).passed
    assert not judge(held, new, criterion).passed
    blurred = judge(driven("new", 50.0, ssim=0.89), held, PromotionConfig())
    assert not blurred.passed
    assert "structure error of whole head (hmc after 20 iterations" in blurred.reason
    assert "is 1.100 times" in blurred.reason


def test_one_region_ten_percent_worse_refuses_a_winner_and_is_named():
    new = driven("new", 80.0, image_mse_mouth=110.0, image_mse_eyes=70.0)
    judgement = judge(new, driven("held", 100.0, image_mse_mouth=100.0, image_mse_eyes=100.0), PromotionConfig())
    assert not judgement.passed
    assert judgement.rows[0].verdict == "better"
    assert (
        "worse by more than 5 %: image error of mouth (hmc after 20 iterations, train cameras, held-out expressions) "
        "is 1.100 times that of held (95 % interval 1.100 to 1.100)"
    ) in judgement.reason
    worse = [row for row in judgement.rows if row.verdict == "worse"]
    assert [(row.metric, row.region, row.candidate, row.champion) for row in worse] == [
        ("image error", "mouth", 110.0, 100.0)
    ]
    page = as_markdown(decision_table(judgement.rows, "decision", judgement.note))
    assert "worse: mouth" in page
    assert "1.100 (1.100–1.100)" in page


@pytest.mark.parametrize(("percent", "passed"), [(5.0, True), (4.0, True), (3.5, False)])
def test_a_guard_that_is_surely_worse_refuses_only_above_the_limit(percent: float, passed: bool):
    new = driven("new", 80.0, geometry_rmse_mm_eyes=1.039)
    held = driven("held", 100.0, geometry_rmse_mm_eyes=1.0)
    assert judge(new, held, PromotionConfig(guard_percent=percent)).passed is passed


def test_noise_above_the_limit_refuses_nothing():
    """The mouth is 10 % worse on average, by one frame of eight: its interval holds 1."""
    new = joined(driven("new", 80.0, image_mse_mouth=100.0))
    scores = (replace(new.scores[0], image_mse_mouth=180.0), *new.scores[1:])
    judgement = judge(replace(new, scores=scores), driven("held", image_mse_mouth=100.0), PromotionConfig())
    assert judgement.passed
    mouth = next(row for row in judgement.rows if (row.metric, row.region) == ("image error", "mouth"))
    assert mouth.ratio == pytest.approx(1.1)
    assert (mouth.low, mouth.verdict) == (1.0, "within limits")


def test_the_start_of_the_fit_and_novel_views_of_the_encoder_are_guarded_and_training_data_is_not():
    def sheet(name: str, factor: float) -> ScoreSheet:
        mse = dict.fromkeys(FRAMES, 100.0 * factor)
        rmse = dict.fromkeys(FRAMES, 1.0)
        novel = scores_of("encoder", 0, mse, rmse, cameras="held-out", calibrated=True)
        raw = scores_of("encoder", 0, mse, rmse, cameras="held-out")
        seen = scores_of("encoder", 0, {"T/000001": 100.0 * factor}, {"T/000001": 1.0})
        start = scores_of("hmc", 0, mse, rmse)
        middle = scores_of("hmc", 10, mse, rmse)
        scores = [*novel, *raw, *seen, *start, *middle, *driven(name).scores]
        return sheet_of(name, scores, held_out_frames=FRAMES)

    rows = judge(sheet("new", 1.2), sheet("held", 1.0), PromotionConfig()).rows
    # The order of the champion's scores: the driven ones first.
    worse = [(row.signal, row.iterations, row.cameras) for row in rows if row.verdict == "worse"]
    assert worse == [("hmc", 0, "train"), ("encoder", 0, "held-out")]
    assert not [row for row in rows if row.iterations == 10 or row.expressions == "train"]
    geometry = [row for row in rows if row.metric == "geometry error"]
    assert {row.cameras for row in geometry} == {"train"}


def test_every_ratio_is_the_paired_one_of_the_tables():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ((torch.rand(8, generator=generator) * 50 + 20).double() for _ in range(2))
    judgement = judge(driven("new", ours.tolist()), driven("held", theirs.tolist()), PromotionConfig())
    expected = bootstrap_ratio(ours, theirs)
    for row in (judgement.rows[0], judgement.rows[1]):
        assert (row.ratio, row.low, row.high) == pytest.approx((expected.mean, expected.low, expected.high), rel=1e-9)


def test_the_first_champion_needs_finite_scores_only():
    judgement = judge(driven("version 1"), None, PromotionConfig())
    assert judgement.passed
    assert judgement.reason == "there was no champion; fitted.psnr_db is 28.1308 dB"
    assert {row.verdict for row in judgement.rows} == {"not compared"}
    assert "100.000" in as_markdown(decision_table(judgement.rows, "errors", judgement.note))
    broken = judge(driven("version 1", geometry_rmse_mm_eyes=math.nan), None, PromotionConfig())
    assert not broken.passed
    assert "geometry_rmse_mm_eyes of version 1 is nan in frame S/000000" in broken.reason


@pytest.mark.parametrize(
    ("champion", "reason"),
    [
        (replace(driven("held"), shards_digest="e" * 64), "different shard sets"),
        (replace(driven("held"), held_out_frames=FRAMES[:7]), "different held-out frames"),
        (replace(driven("held"), train_cameras=("a",)), "different training cameras"),
        (replace(driven("held"), fit={"learning_rate": 0.1}), "was fitted with learning_rate 0.05 and held with 0.1"),
        (driven("held", math.inf), "which is no measurement: evaluate it again, or roll back"),
        (driven("held", signal="encoder"), "held has no scores for fitted.psnr_db: evaluate it with"),
        (
            joined(driven("held", 500.0), driven("held", 500.0, signal="frontal")),
            "it lacks fitted.psnr_db of whole head",
        ),
        (
            replace(driven("held", 500.0), scores=scores_of("hmc", 50, *[dict.fromkeys(FRAMES, 500.0)] * 2)),
            "after 50 iterations",
        ),
    ],
)
def test_what_was_scored_otherwise_is_refused_with_the_remedy(champion: ScoreSheet, reason: str):
    new = replace(driven("new", 50.0), fit={"learning_rate": 0.05, "iterations": 20})
    judgement = judge(new, champion, PromotionConfig())
    assert not judgement.passed
    assert reason in judgement.reason
    assert "evaluate" in judgement.reason
    assert judgement.rows


def test_too_few_frames_show_nothing():
    def few(name: str, mse: float, count: int) -> ScoreSheet:
        mses, rmses = (dict.fromkeys(FRAMES[:count], value) for value in (mse, 1.0))
        return sheet_of(name, scores_of("hmc", 20, mses, rmses), held_out_frames=FRAMES[:count])

    refused = judge(few("new", 50.0, FEWEST_UNITS - 1), few("held", 100.0, FEWEST_UNITS - 1), PromotionConfig())
    assert not refused.passed
    assert "only 5 held-out frames were scored" in refused.reason
    assert judge(few("new", 50.0, FEWEST_UNITS), few("held", 100.0, FEWEST_UNITS), PromotionConfig()).passed
    by_segment = judge(driven("new", 50.0), driven("held"), PromotionConfig(intervals="segment"))
    assert "only 1 held-out segments" in by_segment.reason


def test_a_candidate_without_the_deciding_scores_is_an_error():
    with pytest.raises(
        ConfigError, match=r"no scores for primary_metric fitted.psnr_db, it was scored by \['encoder'\]"
    ):
        judge(driven("new", signal="encoder"), None, PromotionConfig())


@pytest.mark.parametrize("name", ["psnr_db", "fitted.mse", "nose.psnr_db", "fitted.psnr_db.mouth"])
def test_a_primary_metric_that_does_not_exist_is_refused_when_the_recipe_is_built(name: str):
    with pytest.raises(ValidationError, match="is no primary metric: write one of"):
        PromotionConfig(primary_metric=name)


def test_a_line_of_the_table_holds_the_four_regions_of_one_error():
    regions = {f"image_mse_{region}": 90.0 for region in ("mouth", "eyes", "rest")}
    judgement = judge(driven("new", 50.0, **regions), driven("held", **regions), PromotionConfig())
    table = decision_table(judgement.rows, "title", "note")
    assert [row.labels[3] for row in table.rows] == ["image error", "structure error", "geometry error"]
    assert table.rows[0].labels[-1] == "better: whole head"
    assert [cell is not None for cell in table.rows[0].cells] == [True] * 4
    groups = [key for key, _ in groupby(judgement.rows[1:], key=lambda row: row.metric)]
    assert len(groups) == len(table.rows)
