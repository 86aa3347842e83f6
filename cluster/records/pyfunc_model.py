"""A driven avatar as an MLflow model: driving signals in, a face out.

MLflow stores this file beside the avatar's safetensors ("models from code") and runs it when the model is loaded,
so that nothing is pickled. It imports only ``lipflow``, whose source travels with the model.

Input: a mapping of arrays for B frames, named as in ``lipflow.types.DrivingSignals``; only the signals that the
avatar can be driven by are asked for.

===========================  =====================  ==========================================================
``view_vectors``             (B, 3) float32         direction from the head to the eye that looks at it
``hmc_images``               (B, C, 1, h, w) uint8  headset views
``hmc_present``              (B, C) bool            False: that view is missing
``frontal_images``           (B, 3, H, W) uint8     one frontal image
``frontal_present``          (B,) bool              False: that image is missing
``keypoints``                (B, L, 3) float32      x_px, y_px, confidence in the frontal camera (0: not seen)
``frontal_intrinsics``       (B, 3, 3) float32      the frontal camera, for keypoints
``frontal_cam_from_head``    (B, 3, 4) float32      the frontal camera, for keypoints; millimetres
===========================  =====================  ==========================================================

The signals that a frame shows are fused. Output:

===========================  =====================  ==========================================================
``vertices``                 (B, V, 3) float32      mm, head frame
``textures``                 (B, 3, T, T) uint8     row 0 is v = 0, before any camera's colour correction
``latent_mean``              (B, D) float32         of P(y | h)
``latent_std``               (B, D) float32         of P(y | h)
``vertex_std_mm``            (B, V) float32         how far the signals leave each vertex open: the RMS distance from
                                                    its mean over samples of P(y | h)
===========================  =====================  ==========================================================

``params``: ``uncertainty_samples``, 16 unless given, at least 2; 0 saves the time and leaves ``vertex_std_mm`` NaN.
``uncertainty_seed``, 0 unless given: all frames see the same draws, so that a frame's answer depends on no other frame
and moves smoothly in time. The spread is the prior's own claim; what an evaluation measured tells how far to trust it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

from lipflow import sampling
from lipflow.checkpoint import load_avatar
from lipflow.errors import LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.gaussian import DiagonalGaussian
from lipflow.types import CameraTensors, DrivingSignals

SIGNAL_INPUTS = {
    "hmc": ("hmc_images", "hmc_present"),
    "frontal": ("frontal_images", "frontal_present"),
    "keypoints": ("keypoints", "frontal_intrinsics", "frontal_cam_from_head"),
}

PARAMS = {"uncertainty_samples": 16, "uncertainty_seed": 0}
"""What a caller may set, and what holds otherwise."""


def input_arrays(driving: DrivingSignals, view_vectors: torch.Tensor, signals: Sequence[str]) -> dict[str, np.ndarray]:
    """The model's input for ``signals`` of a batch; ``view_vectors`` is ``(B, 3)``."""
    cameras = driving.frontal_cameras
    tensors = {
        "hmc_images": driving.hmc_images,
        "hmc_present": driving.hmc_present,
        "frontal_images": driving.frontal_images,
        "frontal_present": driving.frontal_present,
        "keypoints": driving.keypoints,
        "frontal_intrinsics": None if cameras is None else cameras.intrinsics.float(),
        "frontal_cam_from_head": None if cameras is None else cameras.cam_from_head.float(),
    }
    arrays = {"view_vectors": view_vectors.float().cpu().numpy()}
    for signal in signals:
        for name in SIGNAL_INPUTS[signal]:
            tensor = tensors[name]
            if tensor is None:
                raise LipflowError(f"the batch has no {name}, which the signal {signal} needs: give a full batch")
            arrays[name] = tensor.cpu().numpy()
    return arrays


def driving_signals(arrays: Mapping[str, np.ndarray], signals: Sequence[str], device: torch.device) -> DrivingSignals:
    """The inverse of :func:`input_arrays`.

    Raises:
        LipflowError: an array is missing, or the arrays differ in their number of frames.
    """
    wanted = ["view_vectors", *(name for signal in signals for name in SIGNAL_INPUTS[signal])]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise LipflowError(f"the input lacks {missing}: give arrays named {wanted}")
    lengths = {name: len(arrays[name]) for name in wanted}
    if len(set(lengths.values())) != 1:
        raise LipflowError(f"the input's arrays differ in their number of frames: {lengths}")
    tensors = {name: torch.from_numpy(np.array(arrays[name])).to(device) for name in wanted}
    cameras = None
    if "keypoints" in signals:
        cameras = CameraTensors(tensors["frontal_intrinsics"], tensors["frontal_cam_from_head"])
    return DrivingSignals(
        hmc_images=tensors.get("hmc_images"),
        hmc_present=tensors.get("hmc_present"),
        frontal_images=tensors.get("frontal_images"),
        frontal_present=tensors.get("frontal_present"),
        keypoints=tensors.get("keypoints"),
        frontal_cameras=cameras,
    )


def vertex_std_mm(avatar: Avatar, prior: DiagonalGaussian, samples: int, seed: int) -> torch.Tensor:
    """``(B, V)`` RMS distance of each vertex from its mean over samples of the prior of B frames, mm.

    Args:
        avatar: decodes the samples.
        prior: P(y | h).
        samples: at least 2; 0 for NaN instead.
        seed: of the draws, which all frames share.

    Raises:
        LipflowError: a number of samples that has no spread.
    """
    frames, size = prior.mean.shape
    if samples == 0:
        return torch.full((frames, avatar.context.topology.num_vertices), torch.nan)
    if samples < 2:
        raise LipflowError(f"uncertainty_samples is {samples}, which has no spread: give 2 or more, or 0 for none")
    noise = torch.randn(samples, 1, size, generator=torch.Generator().manual_seed(seed)).to(prior.mean)
    drawn = [avatar.latent_from_driven(y, prior) for y in prior.mean + prior.log_std.exp() * noise]
    return sampling.vertex_std_mm(sampling.decode_meshes(avatar, torch.stack(drawn))).float()


class DrivenAvatar(PythonModel):
    """Decodes the face at f^-1(mean) of the fused P(y | h); no fit is run."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the avatar from its safetensors, onto a GPU where there is one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.avatar = load_avatar(context.artifacts["avatar"]).to(self.device).eval()

    # The input is a mapping of arrays, but MLflow warns about any type hint that it cannot make a schema of, and
    # about none; of this one it knows that it cannot.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict | None = None
    ) -> dict[str, np.ndarray]:
        """See the module's docstring."""
        signals = self.avatar.signals
        arrays = cast(Mapping[str, np.ndarray], model_input)
        driving = driving_signals(arrays, signals, self.device)
        view_vectors = torch.from_numpy(np.array(arrays["view_vectors"], dtype=np.float32)).to(self.device)
        view_vectors = torch.nn.functional.normalize(view_vectors, dim=-1)
        chosen = PARAMS | (params or {})
        with torch.inference_mode():
            prior = self.avatar.fused_prior(signals, driving)
            decoded = self.avatar.decode(self.avatar.start_from(signals, driving), view_vectors[:, None])
            spread_mm = vertex_std_mm(
                self.avatar, prior, int(chosen["uncertainty_samples"]), int(chosen["uncertainty_seed"])
            )
        return {
            "vertices": decoded.vertices.cpu().numpy(),
            "textures": decoded.textures[:, 0].round().clamp(0, 255).to(torch.uint8).cpu().numpy(),
            "latent_mean": prior.mean.cpu().numpy(),
            "latent_std": prior.log_std.exp().cpu().numpy(),
            "vertex_std_mm": spread_mm.cpu().numpy(),
        }


mlflow.models.set_model(DrivenAvatar())
