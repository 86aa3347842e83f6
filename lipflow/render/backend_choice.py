"""The choice of a backend, by name and device."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lipflow.errors import ConfigError
from lipflow.render.backend import Backend, BackendName
from lipflow.render.cpu import CpuBackend
from lipflow.render.cuda import CudaBackend, CudaUnavailableError
from lipflow.render.reference import ReferenceBackend
from lipflow.render.software import SoftwareBackend

_LOG = logging.getLogger(__name__)


def make_backend(name: BackendName, device: torch.device, faces: Tensor, face_uvs: Tensor) -> Backend[Any]:
    """The backend of that name; ``auto`` takes ``cuda`` for tensors on a GPU if nvdiffrast works, else ``cpu``.

    Args:
        name: one of ``auto``, ``reference``, ``cpu``, ``cuda``.
        device: where the vertices will be. ``reference`` and ``cpu`` serve any device.
        faces: ``(F, 3)`` int64.
        face_uvs: ``(F, 3, 2)``.

    Raises:
        ConfigError: no such backend, or one that cannot work here; the message says what to install.
    """
    if name not in ("auto", "reference", "cpu", "cuda"):
        raise ConfigError(f"backend {name!r}: expected auto, reference, cpu or cuda")
    if name == "cuda" or (name == "auto" and device.type == "cuda"):
        try:
            return CudaBackend(faces, face_uvs).prepared(device)
        except CudaUnavailableError as error:
            if name == "cuda":
                raise
            _LOG.warning("triangles on %s are drawn by the CPU: %s", device, error)
    rasterizer = ReferenceBackend if name == "reference" else CpuBackend
    return SoftwareBackend(rasterizer(faces, face_uvs), faces)


__all__ = ["make_backend"]
