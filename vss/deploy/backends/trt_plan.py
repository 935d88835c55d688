"""What TensorRT is asked to build, as data: shapes, limits and flags by name, and the same as shell commands.

A network is always strongly typed: its precision is that of the ONNX file, on TensorRT 10 as on 11. Names are looked up
in the enums of the TensorRT that is installed, so that nothing here knows which of them a version has.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from vss.core.config import TensorRTConfig
from vss.core.environment import folder_name
from vss.core.errors import VssError
from vss.deploy import onnx_file
from vss.deploy.backends.trt_device import Device, sm
from vss.deploy.backends.trt_flavour import VERSION, Flavour

if TYPE_CHECKING:
    from onnx import ModelProto

Shape = tuple[int, ...]
HARDWARE = {"NONE": "none", "SAME_COMPUTE_CAPABILITY": "sameComputeCapability", "AMPERE_PLUS": "ampere+"}
PRECISION_FLAGS = (
    *("FP16", "BF16", "INT8", "FP8", "INT4", "FP4"),
    *("OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"),
)
OWN_FLAGS = {"TF32": "--tf32 or --no-tf32", "VERSION_COMPATIBLE": "--version-compatible"}
OPTIONS = {
    "flags": "--flag",
    "workspace_mib": "--workspace-mib",
    "optimisation_level": "--level",
    "hardware": "--hardware",
    "version_compatible": "--version-compatible",
    "tf32": "--tf32",
    "time_limit_s": "--time-limit-s",
}
"""Field of `TensorRTConfig` -> option of `vss build` and `vss lut build`."""
ADDED = {"targets": "--targets (build.targets)", "timing_cache": "--timing-cache", "aot": "--aot-ptx"}
"""Field that `BuildPlan` adds -> its option."""
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


class BuildPlan(TensorRTConfig):
    """How to build an engine: the options of a recipe, and what a single build adds to them."""

    profiles: tuple[dict[str, Span], ...] = Field(
        default=(), description="optimisation profiles: input -> shapes; an input with fixed dimensions may be left out"
    )
    targets: tuple[str, ...] = Field(default=(), description="GPUs to build for without them; none: sm80 and newer")
    timing_cache: Path | None = Field(
        default=None, description="file of measured layer times; null: one per device and version in the user's cache"
    )
    auxiliary_streams: int | None = Field(default=None, description="null: TensorRT's choice")
    verbosity: str = Field(default="DETAILED", description="of the engine inspector: also LAYER_NAMES_ONLY or NONE")
    aot: Path | None = Field(
        default=None, description="experimental: PTX of VssSegArgmax; the engine needs no plugin library then"
    )

    @field_validator("flags")
    @classmethod
    def _precision_is_no_flag(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for flag in value:
            if flag in OWN_FLAGS:
                raise ValueError(f"{flag} has an option of its own: {OWN_FLAGS[flag]}")
            if flag in PRECISION_FLAGS:
                raise ValueError(
                    f"{flag} is no build option here: the precision is that of the ONNX file, in every TensorRT; "
                    "export with --precision fp16 or int8"
                )
        return value

    def to_options(self) -> list[str]:
        """The options of `vss lut build` for what a recipe can ask of TensorRT, where it is not the default."""
        words = ["--targets", ",".join(self.targets)] if self.targets else []
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value == type(self).model_fields[name].default:
                continue
            if isinstance(value, bool):
                words.append(option if value else f"--no-{option.removeprefix('--')}")
            elif isinstance(value, tuple):
                words += [word for each in value for word in (option, each)]
            else:
                words += [option, str(value).lower()]
        return words

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; files by name, without their folders."""
        names: dict[str, Any] = {"plugins": [path.name for path in self.plugins]}
        names |= {key: path.name if path else None for key in ("aot", "timing_cache") for path in [getattr(self, key)]}
        return self.model_dump(mode="json") | names


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
            raise VssError(
                f"input {name!r} is ({shown}): give smallest, usual and largest H x W for its free sides with --sizes."
            )
        if len(dims) == 4 and dims[-1] != 3 and isinstance(dims[1], str):
            raise VssError(f"input {name!r} is ({', '.join(map(str, dims))}) and its channels are free; fix them.")
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


def commands(plan: BuildPlan, onnx: Path, engine: Path, timing_cache: Path | None, flavour: Flavour) -> dict[str, str]:
    """The same build by NVIDIA's own programs: {"trtexec": ..., "polygraphy": ...}, run in the engine's folder.

    trtexec is a program of the flavour that builds on its GPU.
    """
    trtexec = [f"--onnx={onnx}", f"--saveEngine={engine.name}", "--stronglyTyped", "--skipInference"]
    polygraphy = [str(onnx), "-o", engine.name, "--strongly-typed"]
    for index, profile in enumerate(plan.profiles):
        trtexec += [f"--profile={index}"] if len(plan.profiles) > 1 else []
        for step, low in (("low", "min"), ("best", "opt"), ("high", "max")) if profile else ():
            shapes = {name: getattr(span, step) for name, span in profile.items()}
            trtexec.append(f"--{low}Shapes=" + ",".join(f"{n}:{'x'.join(map(str, s))}" for n, s in shapes.items()))
            polygraphy += [f"--trt-{low}-shapes", *(f"{n}:[{','.join(map(str, s))}]" for n, s in shapes.items())]
    for first, second in _limits(plan, timing_cache):
        trtexec += first
        polygraphy += second
    if plan.targets:
        polygraphy += ["--compute-capabilities", *(f"{name[2:-1]}.{name[-1]}" for name in plan.targets)]
    before = [f"{name}={value}" for name, value in flavour.environment.items()]
    programs = {"trtexec": ["trtexec", *trtexec], "polygraphy": [*before, "polygraphy", "convert", *polygraphy]}
    return {name: shlex.join(words) for name, words in programs.items() if name == "polygraphy" or not before}


def _limits(plan: BuildPlan, timing_cache: Path | None) -> Iterator[tuple[list[str], list[str]]]:
    """Pairs of trtexec and polygraphy options for everything but files and shapes."""
    if timing_cache:
        kept = [f"--{kind}-timing-cache={timing_cache}" for kind in ("load", "save")]
        yield [f"--timingCacheFile={timing_cache}"], kept
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


def default_folder() -> Path:
    """Where timing caches are kept: VSS_CACHE, or vss in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VSS_CACHE") or Path(base) / "vss") / "timing"


def dry_commands(plan: BuildPlan, onnx: Path, out: Path, flavour: Flavour) -> dict[str, str]:
    """The shell commands of a plan without a GPU or TensorRT: what `build` would write beside the engine."""
    cache = None if flavour.targets else plan.timing_cache or default_folder() / "timing.cache"
    return commands(plan, onnx, out, cache, flavour)


def complete(plan: BuildPlan, model: ModelProto, device: Device | None) -> BuildPlan:
    """The plan with what was left to us: one profile for free dimensions, the timing cache of this device."""
    changes: dict[str, Any] = {}
    if not plan.profiles:
        changes["profiles"] = (spans(declared(model)),)
    if plan.timing_cache is None and device is not None:
        changes["timing_cache"] = (
            default_folder() / f"{folder_name(device.name)}-{sm(device.capability)}-trt{VERSION}.cache"
        )
    return plan.model_copy(update=changes)


def refuse_unsigned(path: Path, model: ModelProto, flavour: Flavour) -> None:
    """An INT8 file for runtimes on CPUs: TensorRT refuses it, or makes of it what nobody asked for."""
    if unsigned := onnx_file.quantised_as("UINT8", model):
        raise VssError(
            f"{path} quantises {unsigned[0]} as uint8, for ONNX Runtime and OpenVINO, and {flavour.title} takes int8; "
            f"write it anew: vss export --precision int8 --backend {flavour.name} (in a recipe build.also: "
            f"[{flavour.name}])."
        )


def declared(model: ModelProto) -> dict[str, list[int | str]]:
    """Input name -> dims, int or symbol."""
    constants = {each.name for each in model.graph.initializer}
    return {
        value.name: [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in constants
    }
