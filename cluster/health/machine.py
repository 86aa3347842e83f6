"""This machine: Python and the libraries, GPU and renderer, memory, disks."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil

from cluster.health.finding import Finding
from pipeline.images.codecs import EXTENSION_OF_CODEC, check_codec, decode_image, encode_image

GIB = 2**30
LEAST_SHARED_GIB = 1.0
LEAST_FREE_DISK_GIB, ADVISED_FREE_DISK_GIB = 1.0, 10.0
LEAST_MEMORY_GIB, ADVISED_MEMORY_GIB = 2.0, 6.0
FEWEST_CORES = 2

_SHARED_MEMORY = Path("/dev/shm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def python() -> Finding:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("python", "ok", f"{version}, {sys.executable}")
    return Finding("python", "bad", version, "use Python 3.11 to 3.13")


def torch_build() -> Finding:
    """torch, and whether its build fits the machine."""
    import torch

    build = "CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    found = f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return Finding("torch", "warn", f"{found}, but there is an NVIDIA driver", "install a CUDA build of torch")
    return Finding("torch", "ok", found)


def gpu() -> Finding:
    """The GPUs that torch sees, and the driver."""
    import torch

    driver = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if driver is None:
            return Finding("gpu", "warn", "none", "trainings run on the CPU: fine for trials, slow for full size")
        return Finding("gpu", "warn", f"driver {driver}, but torch sees no GPU", "install a CUDA build of torch for it")
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"{properties.name} {properties.total_memory / GIB:.0f} GiB")
    return Finding("gpu", "ok", f"{', '.join(found)}; driver {driver or 'unknown'}")


def renderer() -> Finding:
    """nvdiffrast and what compiles it, where there is a GPU; else the CPU renderer's compiler."""
    import torch

    if not torch.cuda.is_available():
        return Finding("renderer", "ok", f"the CPU renderer (numba {metadata.version('numba')})")
    missing = [] if find_spec("nvdiffrast") else ["nvdiffrast"]
    missing += [tool for tool in ("nvcc", "ninja") if not shutil.which(tool) and not _beside_python(tool)]
    if missing:
        remedy = "pip install 'lipflow[cuda]', and CUDA's nvcc on the PATH; else triangles are drawn by the CPU"
        return Finding("renderer", "warn", f"without {', '.join(missing)}", remedy)
    return Finding("renderer", "ok", "nvdiffrast, nvcc and ninja")


def numba() -> Finding:
    """Whether the CPU renderer's kernels can be compiled."""
    from numba import njit

    compiled = njit(lambda x: x + 1)
    if compiled(1) != 2:
        return Finding("numba", "bad", "compiles wrong code", "pip install --force-reinstall numba llvmlite")
    return Finding("numba", "ok", metadata.version("numba"))


def codecs() -> Finding:
    """Whether every image codec writes and reads a small image."""
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    failed = []
    for codec, extension in EXTENSION_OF_CODEC.items():
        try:
            check_codec(codec)  # type: ignore[arg-type]
            read = decode_image(encode_image(image, codec), f"image.{extension}")  # type: ignore[arg-type]
            if read.shape != image.shape:
                failed.append(codec)
        except Exception as error:
            failed.append(f"{codec} ({type(error).__name__})")
    if failed:
        remedy = "pip install --force-reinstall pillow imagecodecs simplejpeg; until then choose another codec"
        return Finding("codecs", "warn", f"do not work: {', '.join(failed)}", remedy)
    return Finding("codecs", "ok", ", ".join(EXTENSION_OF_CODEC))


def libraries() -> Finding:
    """The libraries that the jobs stand on."""
    names = ("ray", "mlflow", "webdataset", "s3fs", "zuko", "pyarrow")
    for module in ("ray", "webdataset", "s3fs", "zuko", "pyarrow"):
        importlib.import_module(module)
    return Finding("libraries", "ok", ", ".join(f"{name} {metadata.version(name)}" for name in names))


def cores() -> Finding:
    """The cores that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < FEWEST_CORES:
        return Finding("cores", "warn", str(count), f"use at least {FEWEST_CORES}: workers take turns on one")
    return Finding("cores", "ok", str(count))


def memory() -> Finding:
    """Main memory, and a container's limit on it."""
    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    try:
        limit = int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):
        limit = total
    usable = min(free, limit) / GIB
    found = f"{usable:.1f} GiB usable of {min(total, limit) / GIB:.1f}"
    if usable < LEAST_MEMORY_GIB:
        return Finding("memory", "bad", found, f"free at least {LEAST_MEMORY_GIB:g} GiB: Ray kills jobs for memory")
    if usable < ADVISED_MEMORY_GIB:
        return Finding(
            "memory", "warn", found, f"{ADVISED_MEMORY_GIB:g} GiB let Ray, MLflow and two workers run at once"
        )
    return Finding("memory", "ok", found)


def shared_memory() -> Finding:
    """``/dev/shm``, where Ray keeps its objects."""
    if not _SHARED_MEMORY.is_dir():
        return Finding("/dev/shm", "ok", "none on this system")
    size = shutil.disk_usage(_SHARED_MEMORY).total / GIB
    if size < LEAST_SHARED_GIB:
        remedy = (
            "start the container with --shm-size=2g (Kubernetes: an emptyDir of medium Memory): else Ray uses a disk"
        )
        return Finding("/dev/shm", "warn", f"{size:.2f} GiB", remedy)
    return Finding("/dev/shm", "ok", f"{size:.1f} GiB")


def disk() -> Finding:
    """Where shards are cached and Ray keeps its files."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free in {folder}"
    if free < LEAST_FREE_DISK_GIB:
        return Finding("disk", "bad", found, "make room, or set TMPDIR to a folder on a larger disk")
    if free < ADVISED_FREE_DISK_GIB:
        return Finding("disk", "warn", found, "shards are cached there: set TMPDIR to a folder on a larger disk")
    return Finding("disk", "ok", found)


def git() -> Finding:
    """git, by which runs know their code's version."""
    version = _printed("git", "--version")
    if version is None:
        return Finding(
            "git", "warn", "none", "install git, or set LIPFLOW_CODE_VERSION: runs record the code's version"
        )
    return Finding("git", "ok", version.removeprefix("git version "))


def stack_tools() -> Finding:
    """What ``lipflow stack up`` needs besides."""
    if _beside_python("rclone") or shutil.which("rclone"):
        return Finding("stack", "ok", "rclone is there")
    return Finding("stack", "warn", "no rclone", "pip install 'lipflow[stack]' for `lipflow stack up`; jobs need none")


CHECKS = {
    "python": python,
    "torch": torch_build,
    "gpu": gpu,
    "renderer": renderer,
    "numba": numba,
    "codecs": codecs,
    "libraries": libraries,
    "cores": cores,
    "memory": memory,
    "/dev/shm": shared_memory,
    "disk": disk,
    "git": git,
    "stack": stack_tools,
}
"""Name -> check."""


def _beside_python(tool: str) -> bool:
    return Path(sys.executable).parent.joinpath(tool).is_file()


def _printed(*arguments: str) -> str | None:
    """The first line that a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
