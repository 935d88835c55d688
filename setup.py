"""Builds the extension `vss._C` next to the pure Python package; everything else is in pyproject.toml.

VSS_NATIVE=0: no extension, every op runs its Python reference. VSS_CUDA=0: CPU kernels only; 1: fail without CUDA.
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, MAX_JOBS: as everywhere with torch extensions.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
from pathlib import Path
from subprocess import check_output
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LOG = logging.getLogger("vss.setup")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CXX_FLAGS = ("-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall")


def native_missing() -> str | None:
    """Why no extension is to be built, or None."""
    if os.environ.get("VSS_NATIVE") == "0":
        return "VSS_NATIVE=0"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return None if shutil.which(compiler) else f"no C++ compiler {compiler!r} (install g++ or set CXX)"


def cuda_missing(nvcc: Path) -> str | None:
    """Why no CUDA can be compiled for this torch, or None."""
    import torch

    if os.environ.get("VSS_CUDA") == "0" or torch.version.cuda is None:
        return "VSS_CUDA=0" if torch.version.cuda else "this torch is built without CUDA"
    if not nvcc.exists():
        return "no nvcc (install the CUDA toolkit or set CUDA_HOME)"
    release = re.search(r"release (\d+)\.", check_output([nvcc, "--version"], text=True))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release[1] if release else 'unknown'}, torch wants CUDA {torch.version.cuda}"
    return None


def architectures(nvcc: Path) -> str:
    """TORCH_CUDA_ARCH_LIST: what the environment says, else each of ours that nvcc knows, and PTX for later ones."""
    supported = check_output([nvcc, "--list-gpu-arch"], text=True).split()
    known = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in supported]
    return os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(known) + "+PTX")


def build_command() -> type:
    """torch's build_ext, with x.cpp and x.cu of one folder going to different object files."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            plain = self.compiler.object_filenames

            def names(sources: list[str], *args: Any, **kwargs: Any) -> list[str]:
                pairs = zip(sources, plain(sources, *args, **kwargs), strict=True)
                return [str(Path(o).with_suffix(".cu.o")) if s.endswith(".cu") else o for s, o in pairs]

            self.compiler.object_filenames = names
            super().build_extensions()

    return Build


def extension_arguments() -> dict[str, Any]:
    """The arguments of `setup` that concern the extension; empty where it cannot or must not be built."""
    if missing := native_missing():
        LOG.warning("vss is installed without native kernels, every op runs its Python reference: %s", missing)
        return {}
    if Path("/usr/local/cuda").is_dir():  # nvcc on PATH may be a wrapper that hides the toolkit's folder
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    from torch.utils import cpp_extension

    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    kind, flags = cpp_extension.CppExtension, {"cxx": list(CXX_FLAGS)}
    sources = [*Path("csrc/torch").glob("*.cpp"), *Path("csrc/kernels").glob("*.cpp")]
    if without := cuda_missing(nvcc):
        if os.environ.get("VSS_CUDA") == "1":
            raise SystemExit(f"VSS_CUDA=1, but CUDA kernels cannot be built: {without}")
        LOG.warning("vss is built with CPU kernels only: %s", without)
    else:
        kind, flags["nvcc"] = cpp_extension.CUDAExtension, ["-O3", "--threads=2", "-Xfatbin=-compress-all"]
        sources += Path("csrc/kernels").glob("*.cu")
        flags["cxx"] += ["-DVSS_WITH_CUDA", "-DVSS_ARCHITECTURES=" + re.sub("[; ]+", ",", architectures(nvcc))]
    options = {"extra_compile_args": flags, "extra_link_args": ["-fopenmp"], "include_dirs": [f"{ROOT}/csrc/kernels"]}
    headers = sorted(map(str, Path("csrc").glob("**/*.*h")))
    extension = kind("vss._C", sorted(map(str, sources)), depends=headers, **options)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build_command()}}


setup(**extension_arguments())
