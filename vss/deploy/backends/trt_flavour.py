"""The products that NVIDIA calls TensorRT, as data. This file stands alone, as `trt_runner` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

VERSION = "{version}"
"""Stands for the version of TensorRT in the name of a timing cache until the build says it."""


@dataclass(frozen=True)
class Flavour:
    """A product that NVIDIA calls TensorRT. All are built and run in one way; what differs between them is this row.

    Attributes:
        name: of the runtime in recipes and flags; `title` for people.
        module: that is imported, of one of `packages`; `majors` are the first numbers of versions that are known here.
        install: what to do where it is missing.
        tag: in names of engines, before the version.
        plugin_major: TensorRT whose plugin interface it has; 0 is that of its own version.
        unversioned: name by which its parser opens its library for a file with plugins, and the Python package that has
            this library with the version behind its name alone.
        environment: of the process that builds.
        targets: GPUs by compute capability that an engine can be built for without them; empty where an engine is
            built on its GPU. `elsewhere` are those that another product serves.
        compiles: whether an engine makes its kernels on the GPU when it first runs. Such a product keeps them in a
            runtime cache, and records CUDA graphs itself.
        lacks: option of a build plan -> why it is refused; `lacks_flags` likewise for names of BuilderFlag.
        float_ops: ONNX ops that it runs in floating point, quantised or not.
        steps: precision -> op -> channels of which the widths of such layers are best multiples; `steps_why` says why.
    """

    name: str
    title: str
    module: str
    packages: tuple[str, ...]
    majors: tuple[int, ...]
    install: str
    tag: str
    plugin_major: int = 0
    unversioned: tuple[str, str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    compiles: bool = False
    lacks: Mapping[str, str] = field(default_factory=dict)
    lacks_flags: Mapping[str, str] = field(default_factory=dict)
    float_ops: tuple[str, ...] = ()
    steps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    steps_why: str = ""


TENSORRT = Flavour(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    packages=("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    majors=(10, 11),
    install="pip install tensorrt-cu13 (CUDA 13 driver) or tensorrt-cu12 (CUDA 12); on Jetson it comes with JetPack",
    tag="trt",
    lacks={"targets": "an engine of TensorRT is built on its GPU"},
    steps={kind: {"Conv": step, "ConvTranspose": step} for kind, step in (("fp32", 4), ("fp16", 8), ("int8", 32))},
    steps_why="NVIDIA's alignments for tensor cores, TF32 4, FP16 8 and INT8 32, not measured here",
)
TENSORRT_RTX = Flavour(
    name="tensorrt_rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    packages=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    majors=(1,),
    install="pip install tensorrt-rtx-cu13 (Linux x86_64)",
    tag="rtx",
    plugin_major=11,
    unversioned=("libtensorrt_rtx.so", "tensorrt_rtx_libs"),
    environment={"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    targets={
        "sm75": "T4, RTX 20", "sm80": "A100", "sm86": "A10, A40, RTX 30", "sm89": "L4, L40, RTX 40", "sm120": "RTX 50",
        "sm121": "GB10",
    },
    elsewhere={"sm90": "H100, H200", "sm100": "B200, GB200", "sm103": "B300, GB300", "sm87": "Orin", "sm110": "Thor"},
    compiles=True,
    lacks={
        "hardware": "its engines run on every GPU of their targets",
        "version_compatible": "its engines run on the very version that built them",
        "timing_cache": "it measures no layer while it builds",
        "aot": "it has no plugins that are written in Python",
    },
    lacks_flags={
        "REFIT": "it needs a GPU while building",
        "REFIT_IDENTICAL": "it needs a GPU while building",
        "STRIP_PLAN": "it needs a GPU while building",
        "EXCLUDE_LEAN_RUNTIME": "it has no lean runtime",
    },
    float_ops=("ConvTranspose",),
    steps={
        "fp32": {"ConvTranspose": 8},
        "fp16": {"Conv": 8, "ConvTranspose": 8},
        "int8": {"Conv": 2, "ConvTranspose": 8},
    },
    steps_why="off the eights its compiler puts pad and slice kernels around a transposed convolution, and one before "
    "a convolution of odd channels; half-precision tensor cores take eight channels at once",
)  # fmt: skip
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def gpus(targets: Sequence[str]) -> str:
    """The GPUs that an engine with these targets is for; with none it is for all but the oldest."""
    return ", ".join(targets) or "sm80 and newer"
