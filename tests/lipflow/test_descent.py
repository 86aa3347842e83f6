"""Batched descents: frames do not touch one another, L-BFGS is as good as torch's, and each frame stops by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from lipflow.config import FitConfig
from lipflow.errors import LipflowError
from lipflow.fitting.descent import descend

OPTIMIZERS = ("adam", "lbfgs")


@dataclass
class Valley:
    """Rosenbrock's function of each frame, with its lowest point, of value 0, where all coordinates are ``low (B,)``.

    It counts how many frames were evaluated in each call.
    """

    low: torch.Tensor
    calls: list[int] = field(default_factory=list)

    def rows(self, rows):
        return Valley(self.low[rows], self.calls)

    def coordinates(self, z):
        return z

    def latent(self, coordinates):
        return coordinates

    def __call__(self, x):
        self.calls.append(len(x))
        x = x / self.low[:, None]
        value = (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(-1)
        return value, value


class Cliff(Valley):
    """Not a number beyond a wall that the first long step runs into."""

    def rows(self, rows):
        return Cliff(self.low[rows], self.calls)

    def __call__(self, x):
        value, _ = super().__call__(x)
        value = torch.where((x > 1.5).any(-1), torch.nan, value)
        return value, value


class Kinked(Valley):
    """A valley with a kink along its floor, as renderings have: gradients jump, and line searches run out of trials."""

    def rows(self, rows):
        return Kinked(self.low[rows], self.calls)

    def __call__(self, x):
        self.calls.append(len(x))
        x = x / self.low[:, None]
        value = (8 * (x[:, 1:] - x[:, :-1] ** 2).abs() + (1 - x[:, :-1]) ** 2).sum(-1)
        return value, value


def starts(frames: int, size: int = 6) -> torch.Tensor:
    return torch.randn(frames, size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def valley(*low: float) -> Valley:
    return Valley(torch.tensor(low, dtype=torch.float64))


def lbfgs(**changes) -> FitConfig:
    return FitConfig(**({"optimizer": "lbfgs", "iterations": 300, "patience": None, "learning_rate": 0.1} | changes))


def torch_lbfgs(start: torch.Tensor) -> tuple[torch.Tensor, int]:
    """torch's answer for one frame, and how often it evaluated the objective."""
    x, objective = start.clone().requires_grad_(), valley(1.0)
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=300,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-16,
    )

    def closure():
        optimizer.zero_grad()
        value = objective(x[None])[0].sum()
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach(), len(objective.calls)


def test_lbfgs_finds_what_torchs_finds_frame_by_frame_in_about_as_many_evaluations():
    """Six coordinates: 54 to 71 evaluations by torch's strong Wolfe search, 72 to 88 by ours; answers 6e-9 apart."""
    start = starts(4)
    result = descend(valley(1, 1, 1, 1), start, lbfgs())
    for row in range(4):
        answer, evaluations = torch_lbfgs(start[row])
        torch.testing.assert_close(result.z[row], answer, atol=1e-7, rtol=0)
        assert result.iterations[row] < 2 * evaluations
    assert result.gradient_norm.max() < 1e-9
    assert result.stopped == ("no descent",) * 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_frame_goes_bitwise_the_same_way_among_others_that_stop_before_it(optimizer):
    start, low = starts(3), (0.5, 1.0, 3.0)
    start[0] = 0.5 + 1e-9  # as good as there
    config = lbfgs(optimizer=optimizer, patience=5, tolerance=0.01, iterations=120)
    together = descend(valley(*low), start, config, record=(7, 30))
    assert len(set(together.iterations.tolist())) > 1
    for row in range(3):
        alone = descend(valley(low[row]), start[row : row + 1], config, record=(7, 30))
        assert torch.equal(together.z[row], alone.z[0])
        assert torch.equal(together.trace[:, row], alone.trace[:, 0])
        assert together.stopped[row] == alone.stopped[0]
        assert together.iterations[row] == alone.iterations[0]
        assert all(torch.equal(together.recorded[at][row], alone.recorded[at][0]) for at in (7, 30))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_frame_is_not_evaluated_any_more_and_its_trace_goes_on_level(optimizer):
    objective = valley(1, 1)
    start = starts(2)
    start[0] = 1.0
    result = descend(objective, start, lbfgs(optimizer=optimizer, patience=3, iterations=20))
    assert result.iterations[0] < result.iterations[1]
    going = [(result.iterations >= iteration).sum().item() for iteration in range(21)]
    assert objective.calls == [frames for frames in going if frames]
    assert 1 in objective.calls
    assert (result.trace[result.iterations[0] + 1 :, 0] == result.objective[0]).all()
    assert result.trace.shape == (21, 2)


def test_all_frames_stopped_means_no_evaluation_at_all():
    objective = valley(1, 1)
    result = descend(objective, torch.ones(2, 6, dtype=torch.float64), lbfgs())
    assert objective.calls == [2]
    assert result.trace.shape == (301, 2)
    assert result.stopped == ("no descent",) * 2
    assert result.converged.all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_answer_is_the_best_point_and_the_records_are_the_best_until_then(optimizer):
    config = lbfgs(optimizer=optimizer, iterations=25, learning_rate=0.5)
    marks = (0, 3, 11, 25)
    objective, start = valley(1, 1), starts(2)
    result = descend(objective, start, config, record=marks)
    assert list(result.recorded) == list(marks)
    assert torch.equal(result.recorded[0], start)
    assert torch.equal(result.recorded[25], result.z)
    for mark in marks:
        assert torch.equal(objective(result.recorded[mark])[0], result.trace[: mark + 1].min(0).values)
    assert torch.equal(objective(result.z)[0], result.objective)
    assert (result.relative_decrease >= 0).all()
    shorter = descend(valley(1, 1), start, config.model_copy(update={"iterations": 11}))
    assert torch.equal(shorter.z, result.recorded[11])


def test_lbfgs_shortens_a_step_that_ends_in_no_number_and_adam_stops_there():
    start = torch.full((1, 6), 0.5, dtype=torch.float64)
    wall = Cliff(torch.ones(1, dtype=torch.float64))
    long = {"learning_rate": 3.0, "iterations": 200}
    result = descend(wall, start, lbfgs(**long))
    assert result.objective < 1e-10
    assert torch.isfinite(result.trace).all()
    stopped = descend(wall, start, lbfgs(optimizer="adam", **long))
    assert stopped.stopped == ("not finite",)
    assert not stopped.converged.any()
    assert torch.isfinite(stopped.trace).all()
    assert (stopped.objective <= stopped.trace[0]).all()


def test_lbfgs_goes_down_kinked_valleys_and_frames_stay_apart_there():
    """Measured: the objective ends at 3e-4, 8e-5 and 2e-4 of its start."""
    start, low = starts(3), (0.5, 1.0, 3.0)
    config = lbfgs(iterations=400)
    together = descend(Kinked(torch.tensor(low, dtype=torch.float64)), start, config)
    assert (together.objective < 1e-2 * together.trace[0]).all()
    for row in range(3):
        alone = descend(Kinked(torch.tensor(low[row : row + 1], dtype=torch.float64)), start[row : row + 1], config)
        assert torch.equal(together.z[row], alone.z[0])
        assert together.iterations[row] == alone.iterations[0]


def test_a_plateau_is_told_from_slow_progress():
    adam = lbfgs(optimizer="adam", learning_rate=0.01, patience=40)
    slow = descend(valley(1.0), starts(1), adam.model_copy(update={"iterations": 60, "tolerance": 0.001}))
    assert slow.stopped == ("iterations",)
    assert slow.iterations.tolist() == [60]
    level = descend(valley(1.0), starts(1), adam.model_copy(update={"iterations": 2000, "tolerance": 0.01}))
    assert level.stopped == ("plateau",)
    assert level.iterations < 2000


def test_records_beyond_the_iterations_are_refused():
    with pytest.raises(LipflowError, match="iteration 30, but the fit has 20"):
        descend(valley(1.0), starts(1), lbfgs(iterations=20), record=(3, 30))
