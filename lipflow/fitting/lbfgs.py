"""L-BFGS over a batch of independent frames, each with a history and a line search of its own.

torch's L-BFGS takes all its parameters for one problem: one step length, and one history, for all frames. Here every
frame is a small machine of its own, and one evaluation of the batch serves all of them: while one frame still shortens
its step, another already goes in its next direction.

Directions: two-loop recursion (Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.4). Steps: the weak Wolfe
conditions by bracketing (Lewis and Overton, Nonsmooth optimization via quasi-Newton methods, 2013, algorithm 2.6),
which asks nothing of an objective's smoothness: renderings have kinks wherever a pixel changes its triangle. Brackets
are shortened by safeguarded quadratic interpolation.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENOUGH_DECREASE = 1e-4
_ENOUGH_CURVATURE = 0.9
_MOST_TRIALS = 8
"""Of one line search; then the best step that lowers the objective is taken."""
_ROUNDING = 8.0
"""In units of the last digit of the objective: decreases below it cannot be told from none."""
_LEAST_CURVATURE = 1e-8
"""Cosine of step and gradient change below which a pair says nothing of the curvature."""


class BatchedLbfgs:
    """Independent quasi-Newton descents.

    Args:
        start: ``(B, D)``.
        first_step: RMS over the coordinates of a step in the direction of the gradient, which is tried where nothing
            is known of the curvature.
        history: pairs kept.

    Attributes:
        point: ``(B, D)`` where the objective is to be evaluated next.
    """

    def __init__(self, start: Tensor, first_step: float, history: int):
        frames, size = start.shape
        self.point = start.detach().clone()
        self._first_step = first_step
        self._begun = False
        # The iterates: the last accepted point of each frame, and the search from there.
        self._origin = self.point.clone()
        self._value = start.new_zeros(frames)
        self._gradient = start.new_zeros(frames, size)
        self._direction = start.new_zeros(frames, size)
        self._slope = start.new_zeros(frames)
        self._length = start.new_zeros(frames)
        self._trials = torch.zeros(frames, dtype=torch.long, device=start.device)
        # The bracket: at its lower end the objective is low enough, at its upper end it is not.
        self._low = start.new_zeros(frames)
        self._low_value = start.new_zeros(frames)
        self._low_gradient = start.new_zeros(frames, size)
        self._high = start.new_full((frames,), torch.inf)
        # The oldest pair first; a pair that is not there yet, or said nothing, has the weight 0.
        self._steps = start.new_zeros(history, frames, size)
        self._changes = start.new_zeros(history, frames, size)
        self._weights = start.new_zeros(history, frames)

    def tell(self, value: Tensor, gradient: Tensor, moving: Tensor) -> Tensor:
        """Move on from :attr:`point`.

        Args:
            value: ``(B,)`` of the objective at the point; where it is not finite the step was too long.
            gradient: ``(B, D)`` there.
            moving: ``(B,)`` bool; rows of other frames are ignored and stay.

        Returns:
            ``(B,)`` bool: frames in which not even the gradient's direction leads down any more.
        """
        finite = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
        value = torch.where(finite, value, torch.inf)
        gradient = torch.where(finite[:, None], gradient, 0.0)
        if not self._begun:
            self._begun = True
            self._value, self._gradient = value.clone(), gradient.clone()
            return self._go_on(moving, self._search(moving))
        slack = _ROUNDING * torch.finfo(value.dtype).eps * self._value.abs()
        low_enough = value <= self._value + _ENOUGH_DECREASE * self._length * self._slope + slack
        flat_enough = (gradient * self._direction).sum(-1) >= _ENOUGH_CURVATURE * self._slope
        self._trials += moving
        last = self._trials >= _MOST_TRIALS
        accepted = moving & low_enough & (flat_enough | last)
        lower, upper = moving & low_enough & ~accepted, moving & ~low_enough
        fallen_back = upper & last & (self._low > 0)
        failed = upper & last & ~fallen_back
        interpolated = self._interpolated(value)
        self._low = torch.where(lower, self._length, self._low)
        self._low_value = torch.where(lower, value, self._low_value)
        self._low_gradient = torch.where(lower[:, None], gradient, self._low_gradient)
        self._high = torch.where(upper, self._length, self._high)
        middle = torch.where(self._high.isinf(), 2 * self._length, (self._low + self._high) / 2)
        self._length = torch.where(lower, middle, torch.where(upper, interpolated, self._length))
        self._accept(accepted, self.point, value, gradient)
        lowest = self._origin + self._low[:, None] * self._direction
        self._accept(fallen_back, lowest, self._low_value, self._low_gradient)
        exhausted = failed & (self._weights == 0).all(0)
        self._weights = torch.where(failed, 0.0, self._weights)
        exhausted = exhausted | self._search(accepted | fallen_back | (failed & ~exhausted))
        return self._go_on(moving, exhausted)

    def _go_on(self, moving: Tensor, exhausted: Tensor) -> Tensor:
        trial = self._origin + self._length[:, None] * self._direction
        self.point = torch.where((moving & ~exhausted)[:, None], trial, self.point)
        return exhausted

    def _interpolated(self, value: Tensor) -> Tensor:
        """``(B,)`` length at which the parabola through the bracket's lower end and this trial is lowest."""
        width = self._length - self._low
        slope = (self._low_gradient * self._direction).sum(-1)
        bend = value - self._low_value - slope * width
        share = (-slope * width / (2 * bend)).nan_to_num(nan=0.5, posinf=0.5, neginf=0.5)
        return self._low + width * share.clamp(0.1, 0.5)

    def _accept(self, rows: Tensor, point: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Take ``point`` for the next iterate of ``rows (B,)``, and learn from the way there."""
        step, change = point - self._origin, gradient - self._gradient
        product = (step * change).sum(-1)
        telling = rows & (product > _LEAST_CURVATURE * step.norm(dim=-1) * change.norm(dim=-1)) & (product > 0)
        weight = torch.where(telling, 1 / product, 0.0)
        self._steps = _pushed(self._steps, step, telling)
        self._changes = _pushed(self._changes, change, telling)
        self._weights = _pushed(self._weights, weight, telling)
        self._origin = torch.where(rows[:, None], point, self._origin)
        self._value = torch.where(rows, value, self._value)
        self._gradient = torch.where(rows[:, None], gradient, self._gradient)

    def _search(self, rows: Tensor) -> Tensor:
        """Begin a line search from the iterates of ``rows (B,)``; returns those without any slope."""
        direction = -self._inverse_hessian_times_gradient()
        slope = (direction * self._gradient).sum(-1)
        unknown = (self._weights == 0).all(0)
        norm = self._gradient.norm(dim=-1)
        length = torch.where(unknown, self._first_step * direction.shape[-1] ** 0.5 / norm, 1.0)
        self._direction = torch.where(rows[:, None], direction, self._direction)
        self._slope = torch.where(rows, slope, self._slope)
        self._length = torch.where(rows, length, self._length)
        self._trials = torch.where(rows, 0, self._trials)
        self._low = torch.where(rows, 0.0, self._low)
        self._low_value = torch.where(rows, self._value, self._low_value)
        self._low_gradient = torch.where(rows[:, None], self._gradient, self._low_gradient)
        self._high = torch.where(rows, torch.inf, self._high)
        return rows & ~((slope < 0) & torch.isfinite(self._length))

    def _inverse_hessian_times_gradient(self) -> Tensor:
        vector, factors = self._gradient, []
        for step, change, weight in reversed(list(zip(self._steps, self._changes, self._weights, strict=True))):
            factor = weight * (step * vector).sum(-1)
            vector = vector - factor[:, None] * change
            factors.append(factor)
        latest = self._changes[-1]
        scale = 1 / (self._weights[-1] * latest.square().sum(-1))
        vector = vector * torch.where(self._weights[-1] > 0, scale, 1.0)[:, None]
        for step, change, weight in zip(self._steps, self._changes, self._weights, strict=True):
            factor = factors.pop() - weight * (change * vector).sum(-1)
            vector = vector + factor[:, None] * step
        return vector


def _pushed(history: Tensor, latest: Tensor, rows: Tensor) -> Tensor:
    """The history ``(m, B, ...)`` with ``latest (B, ...)`` at its end, and its oldest entry gone, in ``rows (B,)``."""
    shape = (1, -1) + (1,) * (latest.ndim - 1)
    return torch.where(rows.reshape(shape), torch.cat([history[1:], latest[None]]), history)
