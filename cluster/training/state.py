"""All of a training that changes from step to step: what a checkpoint holds, and nothing else.

The learning rate, the random numbers and the place in the data are functions of the step (:mod:`.optimisation`,
:mod:`.micro_batches`), so they are in no checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.model.avatar import Avatar

AVATAR_FOLDER = "avatar"
STATE_FILE = "state.pt"


class TrainingState:
    """Weights, their average, optimiser and step.

    Args:
        avatar: on its device.
        optimizer: of its parameters.
        ema_decay: of the average of the weights; None: there is none.

    Attributes:
        step: optimiser steps done.
    """

    def __init__(self, avatar: Avatar, optimizer: torch.optim.Optimizer, ema_decay: float | None = None):
        self.avatar = avatar
        self.optimizer = optimizer
        self.step = 0
        self._average = None
        if ema_decay is not None:
            self._average = AveragedModel(avatar, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
            self._average.module.requires_grad_(False)
        self._cpu_copy: Avatar | None = None

    @property
    def exported(self) -> Avatar:
        """The avatar that is validated and kept: the average, or the one that is trained."""
        return self.avatar if self._average is None else cast(Avatar, self._average.module)

    def advance(self) -> None:
        """Count a step of the optimiser; its weights enter the average."""
        self.step += 1
        if self._average is not None:
            self._average.update_parameters(self.avatar)

    def copy(self) -> Callable[[Path], None]:
        """A copy on the CPU, as a function that writes it to an empty folder; one copy is to be written at a time.

        It does not change with the training, so that another thread may write it.
        """
        if self._cpu_copy is None:
            self._cpu_copy = copy.deepcopy(self.exported).cpu()
        avatar = self._cpu_copy
        avatar.load_state_dict(self.exported.state_dict())
        rest: dict[str, Any] = {"step": self.step, "optimizer": _on_cpu(self.optimizer.state_dict())}
        if self._average is not None:
            rest["weights"] = _on_cpu(self.avatar.state_dict())

        def write(folder: Path) -> None:
            save_avatar(avatar, folder / AVATAR_FOLDER)
            torch.save(rest, folder / STATE_FILE)

        return write

    def restore(self, folder: Path) -> None:
        """Take over what :meth:`copy` wrote."""
        exported = load_avatar(folder / AVATAR_FOLDER).state_dict()
        saved = torch.load(folder / STATE_FILE, weights_only=True, map_location="cpu")
        self.avatar.load_state_dict(saved.get("weights", exported))
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        if self._average is not None:
            self._average.module.load_state_dict(exported)
            self._average.n_averaged.fill_(self.step)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value
