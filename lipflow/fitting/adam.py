"""Adam over a batch of independent frames."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchedAdam:
    """torch's Adam: each row of the gradient, and of the optimiser's state, belongs to one frame.

    Args:
        start: ``(B, D)``.
        learning_rate: of every coordinate.

    Attributes:
        point: ``(B, D)`` where the objective is to be evaluated next.
    """

    def __init__(self, start: Tensor, learning_rate: float):
        self.point = start.detach().clone().requires_grad_()
        self._optimizer = torch.optim.Adam([self.point], lr=learning_rate)

    def tell(self, value: Tensor, gradient: Tensor, moving: Tensor) -> Tensor:
        """Move on from :attr:`point`.

        Args:
            value: ``(B,)`` of the objective at the point.
            gradient: ``(B, D)`` there.
            moving: ``(B,)`` bool; what is told of other frames is ignored, and so should be their points.

        Returns:
            ``(B,)`` bool: frames that cannot get any further; Adam always can.
        """
        del value
        self.point.grad = torch.where(moving[:, None], gradient, 0.0)
        self._optimizer.step()
        return torch.zeros_like(moving)
