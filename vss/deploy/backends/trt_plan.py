"""What TensorRT is asked to build, as data: shapes, limits and flags by name, and the same as shell commands.

A network is always strongly typed: its precision is that of the ONNX file, on TensorRT 10 as on 11. The one exception
is `Calibration`, the int8 path of TensorRT 10 for files without Q/DQ (Jetson, DLA). Names are looked up in the enums of
the TensorRT that is installed, so that nothing here knows which of them a version has.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.errors import VssError, need, unknown

Shape = tuple[int, ...]
Feed = Mapping[str, np.ndarray]
HARDWARE = {"NONE": "none", "SAME_COMPUTE_CAPABILITY": "sameComputeCapability", "AMPERE_PLUS": "ampere+"}
CALIBRATORS = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}
PRECISION_FLAGS = (
    *("FP16", "BF16", "INT8", "FP8", "INT4", "FP4"),
    *("OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"),
)
TRTEXEC_FLAGS = {  # BuilderFlag -> option of trtexec and of polygraphy
    "SPARSE_WEIGHTS": ("--sparsity=enable", "--sparse-weights"),
    "REFIT": ("--refit", "--refittable"),
    "STRIP_PLAN": ("--stripWeights", "--strip-plan"),
    "DIRECT_IO": ("--directIO", "--direct-io"),
    "GPU_FALLBACK": ("--allowGPUFallback", "--allow-gpu-fallback"),
    "EXCLUDE_LEAN_RUNTIME": ("--excludeLeanRuntime", "--exclude-lean-runtime"),
    "ERROR_ON_TIMING_CACHE_MISS": ("--errorOnTimingCacheMiss", "--error-on-timing-cache-miss"),
    "DISABLE_COMPILATION_CACHE": ("--noCompilationCache", "--disable-compilation-cache"),
}


@dataclass(frozen=True)
class Span:
    """Shapes of one input: the smallest, the one to be fast at, the largest."""

    low: Shape
    best: Shape
    high: Shape

    def __post_init__(self) -> None:
        ranks = {len(shape) for shape in (self.low, self.best, self.high)}
        ordered = len(ranks) == 1 and all(
            0 < a <= b <= c for a, b, c in zip(self.low, self.best, self.high, strict=True)
        )
        if not ordered:
            raise VssError(
                f"the shapes {self.low}, {self.best}, {self.high} are no smallest, usual and largest of one input; "
                "every side must be positive and not fall."
            )


@dataclass(frozen=True)
class Calibration:
    """The int8 path of TensorRT 10 for an ONNX without Q/DQ. TensorRT 11 has none.

    Args:
        feeds: batches, each input name -> array of one batch at the shape to be fast at; may be lazy, is read once.
        cache: file of the ranges; where it exists, `feeds` is not read.
        method: "entropy" or "minmax".
        fp16: layers that are not int8 may run in float16.
    """

    feeds: Iterable[Feed]
    cache: Path | None = None
    method: str = "entropy"
    fp16: bool = True

    def __post_init__(self) -> None:
        if self.method not in CALIBRATORS:
            raise unknown("calibrator", self.method, CALIBRATORS)


@dataclass(frozen=True)
class BuildPlan:
    """How to build an engine.

    Args:
        profiles: per optimisation profile, input name -> Span; an input with fixed dimensions may be left out.
        workspace_mib: largest scratch memory of a layer; None is all of the device.
        optimisation_level: 0 (quick build) to 5 (long search); None is TensorRT's default of 3.
        tf32: float32 layers may use TF32 tensor cores.
        hardware: NONE, SAME_COMPUTE_CAPABILITY or AMPERE_PLUS: on which other GPUs the engine may run.
        version_compatible: the engine also loads in newer releases of the same major version; it carries host code.
        timing_cache: file of measured layer times; None is one per device and version in the user's cache folder.
        flags: further names of trt.BuilderFlag. Precision is none of them.
        auxiliary_streams: None is TensorRT's choice.
        verbosity: DETAILED for the engine inspector, LAYER_NAMES_ONLY or NONE.
        plugins: libraries with plugins; ops that they implement replace function bodies of the ONNX.
        aot: experimental: PTX of VssSegArgmax (`trt_aot`); the engine needs no plugin library then.
        calibration: see `Calibration`.
    """

    profiles: tuple[Mapping[str, Span], ...] = ()
    workspace_mib: int | None = None
    optimisation_level: int | None = None
    tf32: bool = True
    hardware: str = "NONE"
    version_compatible: bool = False
    timing_cache: Path | None = None
    flags: tuple[str, ...] = ()
    auxiliary_streams: int | None = None
    verbosity: str = "DETAILED"
    plugins: tuple[Path, ...] = ()
    aot: Path | None = None
    calibration: Calibration | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.hardware not in HARDWARE:
            raise unknown("hardware compatibility", self.hardware, HARDWARE)
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise VssError(f"workspace_mib is {self.workspace_mib}; expected a number of MiB, 1 or more.")
        if self.optimisation_level is not None and not 0 <= self.optimisation_level <= 5:
            raise VssError(f"optimisation_level is {self.optimisation_level}; expected 0 to 5.")
        for flag in self.flags:
            if flag in PRECISION_FLAGS:
                raise VssError(
                    f"{flag} is no build option here: the precision is that of the ONNX file, in every TensorRT; "
                    "export with --precision fp16 or int8."
                )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; calibration as method and cache."""
        data = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        data["profiles"] = [
            {name: {"low": list(s.low), "best": list(s.best), "high": list(s.high)} for name, s in profile.items()}
            for profile in self.profiles
        ]
        data["flags"] = list(self.flags)
        data["plugins"] = [path.name for path in self.plugins]
        data["aot"] = self.aot.name if self.aot else None
        data["timing_cache"] = self.timing_cache.name if self.timing_cache else None
        if self.calibration:
            cache = self.calibration.cache
            data["calibration"] = {
                "method": self.calibration.method,
                "fp16": self.calibration.fp16,
                "cache": cache.name if cache else None,
            }
        return data


def member(enum: Any, name: str) -> Any:
    """The member of a TensorRT enum by name, or the sentence that lists what this version has."""
    names = enum.__members__
    if name not in names:
        raise unknown(f"{enum.__name__} of this TensorRT", name, names)
    return names[name]


def config_arguments(trt: Any, plan: BuildPlan) -> dict[str, Any]:
    """The arguments of polygraphy's CreateConfig: every name resolved in the enums of this TensorRT."""
    need("polygraphy", "building TensorRT engines")
    from polygraphy.backend.trt import Profile

    profiles = [Profile() for _ in plan.profiles] or [Profile()]
    for made, wanted in zip(profiles, plan.profiles, strict=False):
        for name, span in wanted.items():
            made.add(name, span.low, span.best, span.high)
    arguments: dict[str, Any] = {
        "profiles": profiles,
        "tf32": plan.tf32,
        "version_compatible": plan.version_compatible,
        "profiling_verbosity": member(trt.ProfilingVerbosity, plan.verbosity),
        "hardware_compatibility_level": member(trt.HardwareCompatibilityLevel, plan.hardware),
        "builder_optimization_level": plan.optimisation_level,
        "max_aux_streams": plan.auxiliary_streams,
    }
    if plan.workspace_mib is not None:
        arguments["memory_pool_limits"] = {member(trt.MemoryPoolType, "WORKSPACE"): plan.workspace_mib << 20}
    if plan.calibration is not None:
        arguments |= {"int8": True, "fp16": plan.calibration.fp16, "calibrator": calibrator(trt, plan.calibration)}
    return arguments


def calibrator(trt: Any, calibration: Calibration) -> Any:
    """Polygraphy's calibrator over the feeds; only TensorRT 10 has the class it stands on."""
    base = getattr(trt, CALIBRATORS[calibration.method], None)
    if base is None:
        raise VssError(
            f"TensorRT {trt.__version__} has no calibrators: export the ONNX with --precision int8, which writes the "
            "same ranges as Q/DQ."
        )
    from polygraphy.backend.trt import Calibrator

    feeds, cache = calibration.feeds, calibration.cache
    if cache is None or not cache.exists():
        feeds = _checked(feeds)
    elif not cache.read_bytes().startswith(b"TRT-"):
        raise VssError(f"{cache} is no calibration cache of TensorRT; remove it to calibrate again.")
    return Calibrator(feeds, cache=None if cache is None else str(cache), BaseClass=base)


def _checked(feeds: Iterable[Feed]) -> Iterable[Feed]:
    """The batches, unless there is none; the first is looked at now."""
    rest = iter(feeds)
    first = next(rest, None)
    if first is None:
        raise VssError("the calibration set is empty; give at least one batch of training images.")

    def batches() -> Iterable[Feed]:
        yield first
        yield from rest

    return batches()


def spans(
    inputs: Mapping[str, Sequence[int | str]],
    batches: Sequence[int] = (1, 1, 8),
    sizes: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Span]:
    """One optimisation profile from the dimensions that an ONNX file declares.

    Args:
        inputs: name -> dims, int or symbol; images are (N, 3, H, W) or (N, H, W, 3).
        batches: smallest, usual and largest N.
        sizes: smallest, usual and largest (H, W); needed where H or W is a symbol.
    """
    found = {}
    for name, dims in inputs.items():
        if all(isinstance(side, int) for side in dims):
            continue
        if any(isinstance(side, str) for side in dims[1:]) and (sizes is None or len(dims) != 4):
            shown = ", ".join(map(str, dims))
            raise VssError(f"input {name!r} is ({shown}): give smallest, usual and largest H x W for its free sides.")
        shapes = [tuple(_side(dims, axis, step, batches, sizes) for axis in range(len(dims))) for step in range(3)]
        found[name] = Span(*shapes)
    return found


def _side(
    dims: Sequence[int | str], axis: int, step: int, batches: Sequence[int], sizes: Sequence[tuple[int, int]] | None
) -> int:
    side = dims[axis]
    if isinstance(side, int):
        return side
    if axis == 0 or sizes is None:
        return batches[step]
    first = 1 if dims[-1] == 3 else 2
    return sizes[step][axis - first]


def commands(plan: BuildPlan, onnx: Path, engine: Path, timing_cache: Path) -> dict[str, str]:
    """The same build by NVIDIA's own programs: {"trtexec": ..., "polygraphy": ...}, run in the engine's folder."""
    trtexec = [f"--onnx={onnx}", f"--saveEngine={engine.name}", "--stronglyTyped", "--skipInference"]
    polygraphy = [str(onnx), "-o", engine.name, "--strongly-typed"]
    if plan.calibration is not None:
        trtexec[2:3] = ["--int8", *(["--fp16"] if plan.calibration.fp16 else [])]
        polygraphy[3:] = ["--int8", *(["--fp16"] if plan.calibration.fp16 else [])]
        if plan.calibration.cache is not None:
            trtexec.append(f"--calib={plan.calibration.cache}")
            polygraphy += ["--calibration-cache", str(plan.calibration.cache)]
    for index, profile in enumerate(plan.profiles):
        trtexec += [f"--profile={index}"] if len(plan.profiles) > 1 else []
        for step, low in (("low", "min"), ("best", "opt"), ("high", "max")) if profile else ():
            shapes = {name: getattr(span, step) for name, span in profile.items()}
            trtexec.append(f"--{low}Shapes=" + ",".join(f"{n}:{'x'.join(map(str, s))}" for n, s in shapes.items()))
            polygraphy += [f"--trt-{low}-shapes", *(f"{n}:[{','.join(map(str, s))}]" for n, s in shapes.items())]
    for first, second in _limits(plan, timing_cache):
        trtexec += first
        polygraphy += second
    programs = {"trtexec": ["trtexec", *trtexec], "polygraphy": ["polygraphy", "convert", *polygraphy]}
    return {name: shlex.join(words) for name, words in programs.items()}


def _limits(plan: BuildPlan, timing_cache: Path) -> Iterable[tuple[list[str], list[str]]]:
    """Pairs of trtexec and polygraphy options for everything but files and shapes."""
    yield [f"--timingCacheFile={timing_cache}"], [f"--{kind}-timing-cache={timing_cache}" for kind in ("load", "save")]
    yield [f"--profilingVerbosity={plan.verbosity.lower()}"], ["--profiling-verbosity", plan.verbosity.lower()]
    if plan.workspace_mib is not None:
        yield [f"--memPoolSize=workspace:{plan.workspace_mib}M"], ["--pool-limit", f"workspace:{plan.workspace_mib}M"]
    if plan.optimisation_level is not None:
        level = str(plan.optimisation_level)
        yield [f"--builderOptimizationLevel={level}"], ["--builder-optimization-level", level]
    if plan.auxiliary_streams is not None:
        yield [f"--maxAuxStreams={plan.auxiliary_streams}"], ["--max-aux-streams", str(plan.auxiliary_streams)]
    if plan.hardware != "NONE":
        other = plan.hardware.lower()
        yield [f"--hardwareCompatibilityLevel={HARDWARE[plan.hardware]}"], ["--hardware-compatibility-level", other]
    if plan.version_compatible:
        yield ["--versionCompatible"], ["--version-compatible"]
    yield ([], ["--tf32"]) if plan.tf32 else (["--noTF32"], [])
    for flag in plan.flags:
        if flag in TRTEXEC_FLAGS:
            first, second = TRTEXEC_FLAGS[flag]
            yield [first], [second]
    for library in plan.plugins:
        yield [f"--staticPlugins={library}"], ["--plugins", str(library)]
