"""Inference-time optimisation: the latent code that explains what a driving signal shows.

    z* = argmin_z  L_obs(D(z), o) - lambda / D log P(f(z) | h),  started at f^-1(mean of P(y | h))

``dam`` has P = N(0, I) and starts at z = 0. The density is that of y, whose mode is the start: MAP estimates depend on
the coordinates, and the mode of p(z | h), with the flow's log-determinant, can be a worse face than the driver's answer
(``FitConfig.density`` offers it). Frames are optimised side by side and never influence each other.

:mod:`~lipflow.fitting.observations` states L_obs, :mod:`~lipflow.fitting.objective` the whole, in z or in y;
:mod:`~lipflow.fitting.adam` and :mod:`~lipflow.fitting.lbfgs` move the frames, :mod:`~lipflow.fitting.descent` drives
them and stops each where it gets no further; :mod:`~lipflow.fitting.sequence` follows a face through time;
:mod:`~lipflow.fitting.uncertainty` says how sure an answer is.
"""

from lipflow.fitting.descent import FitResult
from lipflow.fitting.fit import fit
from lipflow.fitting.observations import GREY_OF_RGB
from lipflow.fitting.sequence import fit_sequence
from lipflow.fitting.uncertainty import LatentPosterior, posterior, vertex_std_mm

__all__ = ["GREY_OF_RGB", "FitResult", "LatentPosterior", "fit", "fit_sequence", "posterior", "vertex_std_mm"]
