"""Which frames of an evaluation are neighbours, which are failures, and which recipes are refused."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.evaluate import EvaluateRecipe, chosen_frames
from cluster.reports.gallery import Picture, failure_sheets, worst_frames
from cluster.scores.evaluation_tasks import consecutive_runs
from lipflow.config import FitConfig
from tests.cluster.score_sheets import FRAMES, constant, scores_of


def _frames(segment: str, numbers) -> list[str]:
    return [f"{segment}/{number:06d}" for number in numbers]


def test_runs_end_with_segments_and_at_lost_frames():
    everything = _frames("A", (10, 13, 16, 22, 25, 28, 31)) + _frames("B", (34, 35))
    # 19 was lost; B is too short for a second difference.
    assert consecutive_runs(everything, everything) == [_frames("A", (10, 13, 16)), _frames("A", (22, 25, 28, 31))]


def test_frames_that_were_not_chosen_end_a_run():
    everything = _frames("A", range(8))
    assert consecutive_runs(_frames("A", (0, 1, 2, 4, 6, 7)), everything) == [_frames("A", (0, 1, 2))]
    assert consecutive_runs(_frames("A", (0, 2, 4, 6)), everything) == []


def test_frames_without_numbers_are_neighbours_by_their_place():
    everything = ["A/first", "A/second", "A/third"]
    assert consecutive_runs(everything, everything) == [everything]


def test_frames_are_chosen_in_runs_evenly_spread():
    everything = _frames("A", range(7)) + _frames("B", range(6)) + _frames("C", range(2))
    recipe = EvaluateRecipe(max_frames=6, consecutive=3)
    assert chosen_frames(everything, recipe) == _frames("A", (0, 1, 2)) + _frames("B", (3, 4, 5))
    assert chosen_frames(everything, EvaluateRecipe(max_frames=2)) == [everything[0], everything[-1]]
    assert chosen_frames(everything, EvaluateRecipe()) == everything


def test_failures_are_the_worst_held_out_frames_after_the_longest_fit():
    mse = dict(zip(FRAMES, (1.0, 9.0, 4.0, 4.0), strict=True))
    rmse = dict(zip(FRAMES, (7.0, 1.0, 2.0, 3.0), strict=True))
    scores = [
        *scores_of("hmc", 0, constant(99.0), constant(99.0)),
        *scores_of("hmc", 10, mse, rmse),
        *scores_of("hmc", 10, {"T/000001": 1000.0}, {"T/000001": 1000.0}),
        *scores_of("mean face", 0, constant(500.0), constant(50.0)),
    ]
    failures = worst_frames(scores, FRAMES, 2)
    found = [(failure.metric, failure.rank, failure.score.frame_id, failure.median) for failure in failures]
    assert found == [
        ("image_mse", 1, FRAMES[1], 4.0),
        ("image_mse", 2, FRAMES[2], 4.0),
        ("geometry_rmse_mm", 1, FRAMES[0], 2.5),
        ("geometry_rmse_mm", 2, FRAMES[3], 2.5),
    ]
    photo = np.full((12, 10, 3), 90, np.uint8)
    pictures = [Picture(frame, "a", "hmc", photo, photo) for frame in FRAMES]
    assert set(failure_sheets(failures, pictures)) == {"hmc-image_mse", "hmc-geometry_rmse_mm"}


def test_iterations_follow_from_the_protocol_unless_they_are_given():
    fit = FitConfig(iterations=20)
    assert EvaluateRecipe(fit=fit).scored_iterations == (0, 20)
    assert EvaluateRecipe(fit=fit, protocol="lipflow").scored_iterations == (0, 10, 50, 200)
    assert EvaluateRecipe(fit=fit, protocol="lipflow", fit_iterations=(5, 7)).scored_iterations == (5, 7)
    assert EvaluateRecipe(fit=FitConfig(iterations=0)).scored_iterations == (0,)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"fit_iterations": (10, 0)}, "fit_iterations"),
        ({"fit_iterations": (-1, 3)}, "fit_iterations"),
        ({"fit_iterations": ()}, "fit_iterations"),
        ({"max_frames": 2, "consecutive": 3}, "consecutive"),
        ({"protocol": "both"}, "protocol"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused_by_name(settings, field):
    with pytest.raises(ValidationError, match=field):
        EvaluateRecipe(**settings)
