"""Driving encoders P(y | h): what an impoverished signal says about the face, as a Gaussian over y.

One file a signal: its declaration (:class:`lipflow.model.drivers.signal.Signal`), its encoder, and its view for the
fit. Every module of this room is imported here, so that a new file is a new signal, which can be configured, trained,
fused and saved by its name. To be fitted to, it also needs what it shows in ``lipflow.fitting.observations``; and one
that is computed from nothing in :class:`lipflow.types.DrivingSignals` needs a field there, and a reader of it in
``pipeline``.

Each driver sees its own signal alone, and what is absent has no influence: whatever stands in its place, it is masked.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from lipflow.model.drivers.frontal import frontal_view
from lipflow.model.drivers.hmc import headset_views
from lipflow.model.drivers.images import SeenViews
from lipflow.model.drivers.keypoints import landmark_residuals_mm, seen_keypoints
from lipflow.model.drivers.signal import Driver, Signal, find_signal, given_signals, register, registered_signals

__all__ = [
    "Driver",
    "SeenViews",
    "Signal",
    "find_signal",
    "frontal_view",
    "given_signals",
    "headset_views",
    "import_signals",
    "landmark_residuals_mm",
    "register",
    "registered_signals",
    "seen_keypoints",
]


def import_signals() -> None:
    """Import every module of this room; those that declare a signal register it."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


import_signals()
