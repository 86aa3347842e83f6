"""Build the CPU kernels of DRTK and pytorch3d alone: ``render_peer_build.py DRTK PYTORCH3D OUT [CUDA_INCLUDE]``.

DRTK and PYTORCH3D are source checkouts of facebookresearch/DRTK (MIT) and facebookresearch/pytorch3d (BSD). Their own
installers compile their CUDA kernels as well. Run by the peers' interpreter (torch, ninja, a C++ compiler; DRTK's
headers also include ``cuda_runtime.h``, which no kernel here uses). ``LIPFLOW_PEER_OPS=OUT`` then lets
``render_peers.py`` find them.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import load

_PYTORCH3D_BINDING = """#include "rasterize_meshes/rasterize_meshes.h"
PYBIND11_MODULE(pytorch3d_cpu, m) { m.def("rasterize_meshes", &RasterizeMeshesNaiveCpu); }
"""


def build(name: str, sources: list[Path], include: list[Path], flags: list[str], out: Path) -> None:
    """One shared library ``OUT/NAME.so``."""
    with tempfile.TemporaryDirectory() as folder:
        load(
            name,
            [str(source) for source in sources],
            build_directory=folder,
            extra_include_paths=[str(path) for path in include],
            extra_cflags=flags,
            # Some functions of a module are defined beside the CUDA kernels that they stand for.
            extra_ldflags=["-Wl,--allow-multiple-definition"],
            is_python_module=name.startswith("pytorch3d"),
        )
        shutil.copy(Path(folder, f"{name}.so"), out / f"{name}.so")


def cuda_stubs(header: Path) -> str:
    """Definitions that refuse for the functions ``..._cuda`` that a header declares."""
    text = re.sub(r"//.*|#pragma once", "", header.read_text())
    declared = [part.strip() for part in text.split(";") if re.search(r"_cuda(_backward)?\(", part)]
    bodies = "\n".join(f'{function} {{ TORCH_CHECK(false, "built without CUDA"); }}' for function in declared)
    return f"#include <torch/extension.h>\n{bodies}\n"


def main() -> None:
    """Build four libraries."""
    drtk, pytorch3d, out = (Path(argument) for argument in sys.argv[1:4])
    cuda_include = Path(sys.argv[4] if len(sys.argv) > 4 else "/usr/local/cuda/include")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rasterize", "render", "interpolate"):
            kernels = drtk / "src" / name
            stubs = Path(folder, f"{name}_stubs.cpp")
            stubs.write_text(cuda_stubs(kernels / f"{name}_kernel.h"))
            sources = [kernels / f"{name}_module.cpp", kernels / f"{name}_kernel_cpu.cpp", stubs]
            # The flags of its own setup.py.
            flags = ["-O3", "--fast-math"]
            build(f"{name}_ext", sources, [drtk / "src" / "include", kernels, cuda_include], flags, out)
        csrc = pytorch3d / "pytorch3d" / "csrc"
        binding = Path(folder, "binding.cpp")
        binding.write_text(_PYTORCH3D_BINDING)
        sources = [binding, csrc / "rasterize_meshes" / "rasterize_meshes_cpu.cpp"]
        build("pytorch3d_cpu", sources, [csrc], ["-O3"], out)


if __name__ == "__main__":
    main()
