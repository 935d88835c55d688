"""What a bundle needs of a runtime: a row each, so that no other file knows their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vss.core.environment import package_version
from vss.core.errors import unknown
from vss.deploy.backends import BACKENDS, onnx_runner, trt_runner

ON_GPU = ("pycuda", "cuda-python")
"""Memory of the device, from one of them."""


@dataclass(frozen=True)
class Runtime:
    """One runtime.

    Attributes:
        packages: distributions that run its engines; those that are here are written down with their versions.
        runner: the modules beside run.py that open them.
        variants: the Triton repositories that serve them, see `vss.ship.triton.VARIANTS`; the best first.
        cpp: the smallest program in C++ that runs them.
    """

    packages: tuple[str, ...]
    runner: tuple[Path, ...]
    variants: tuple[str, ...] = ()
    cpp: str = ""

    @property
    def versions(self) -> dict[str, str]:
        return {name: version for name in self.packages if (version := package_version(name))}


ONNX = (Path(str(onnx_runner.__file__)),)
TRT = tuple(Path(str(trt_runner.__file__)).with_name(name) for name in trt_runner.ALONE)
RUNTIMES = {
    "onnxruntime": Runtime(("onnxruntime",), ONNX, ("onnxruntime", "python"), "ort_example.cpp"),
    "openvino": Runtime(("openvino",), ONNX, ("python",)),
    "tensorrt": Runtime(("tensorrt", *ON_GPU), TRT, ("tensorrt",), "trt_example.cpp"),
    "tensorrt_rtx": Runtime(("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", *ON_GPU), TRT),
}


def runtime_of(backend: str) -> Runtime:
    """The row of a runtime; raises `VssError` for one whose engines no bundle holds."""
    name = BACKENDS.canonical(backend)
    if name not in RUNTIMES:
        raise unknown("runtime of a bundle", name, RUNTIMES)
    return RUNTIMES[name]
