"""LiP-Flow: face avatars that are trained on domes and driven by little.

===================  =============================================================================================
``types``            words and conventions: units, frames, cameras, textures; batches and driving signals
``config``           settings of the avatar, the losses, the fit and the renderer
``model``            the avatar: encoder, decoder, colours, flow, and ``model.drivers``, a file for each signal
``render``           differentiable rendering, and unwrapping
``losses``           what trainings minimise
``fitting``          the latent code that explains a signal, through time if asked, and how sure it is
``sampling``         faces drawn from a prior
``metrics``          how far two faces differ; ``regions`` where, ``sample_metrics`` two sets of faces
``bootstrap``        intervals of what was measured
``checkpoint``       avatars as files; ``addresses`` where else they may lie
``multiface``        weights of the public Multiface code
``memory``           large arrays of pixels, written again once nobody holds them
===================  =============================================================================================

The names below are loaded at first use, so that ``import lipflow`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipflow.checkpoint import load_avatar, save_avatar
    from lipflow.config import AvatarConfig, FitConfig, LossConfig
    from lipflow.errors import LipflowError
    from lipflow.fitting import fit
    from lipflow.losses import training_loss
    from lipflow.model.avatar import Avatar
    from lipflow.model.context import AvatarContext
    from lipflow.render.renderer import Renderer

__all__ = [
    "Avatar",
    "AvatarConfig",
    "AvatarContext",
    "FitConfig",
    "LipflowError",
    "LossConfig",
    "Renderer",
    "fit",
    "load_avatar",
    "save_avatar",
    "training_loss",
]

_MODULE_OF = {
    "Avatar": "lipflow.model.avatar",
    "AvatarConfig": "lipflow.config",
    "AvatarContext": "lipflow.model.context",
    "FitConfig": "lipflow.config",
    "LipflowError": "lipflow.errors",
    "LossConfig": "lipflow.config",
    "Renderer": "lipflow.render.renderer",
    "fit": "lipflow.fitting",
    "load_avatar": "lipflow.checkpoint",
    "save_avatar": "lipflow.checkpoint",
    "training_loss": "lipflow.losses",
}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
