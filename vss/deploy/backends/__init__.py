"""Runtimes by name. A new one is a file with a `Backend` and one row here; users add theirs to `BACKENDS`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from vss.core.config import BuildConfig
from vss.core.errors import VssError, listed
from vss.core.files import parse_json, read_text
from vss.core.registry import Registry
from vss.deploy.backends.base import Backend, Binding, BuildSpec, Int8, Session
from vss.deploy.backends.eager import TorchBackend, TorchSession
from vss.deploy.backends.ort import OnnxRuntimeBackend
from vss.deploy.backends.ov import OpenVINOBackend
from vss.deploy.backends.trt import TensorRTBackend
from vss.deploy.backends.trt_flavour import TENSORRT, TENSORRT_RTX
from vss.deploy.backends.trt_plan import BuildPlan

__all__ = ["Backend", "Binding", "BuildSpec", "Session", "TorchSession"]

BACKENDS: Registry[Backend] = Registry("backend")
BACKENDS.add("onnxruntime", OnnxRuntimeBackend(), aliases=["ort"])
BACKENDS.add("openvino", OpenVINOBackend(), aliases=["ov"])
BACKENDS.add("tensorrt", TensorRTBackend(TENSORRT), aliases=["trt"])
BACKENDS.add("tensorrt_rtx", TensorRTBackend(TENSORRT_RTX), aliases=["rtx"])
BACKENDS.add("torch", TorchBackend())


def available(name: str) -> Any:
    """A backend that can run here, or the sentence that says what is missing."""
    backend = BACKENDS[name]
    reason = backend.unavailable()
    if reason:
        raise VssError(reason)
    return backend


def of_tensorrt(name: str) -> TensorRTBackend | None:
    """The runtime of that name where it is a TensorRT of some flavour."""
    backend = BACKENDS[name]
    return backend if isinstance(backend, TensorRTBackend) else None


AUTO = "auto"
"""In place of a runtime, in a run: the fastest of those that are installed."""


def main_of(config: BuildConfig) -> str:
    """The runtime of a run's first engines: that of the recipe, and the one that is everywhere for `auto`."""
    return "onnxruntime" if config.backend == AUTO else BACKENDS.canonical(config.backend)


def others_of(config: BuildConfig, *, here: bool = True) -> list[str]:
    """Further runtimes of a run: those of `build.also`, and for `auto` all that are installed and run here.

    `here` are those whose engines are scored and timed, else those whose engines are built alone.
    """
    names = [BACKENDS.canonical(name) for name in config.also]
    if config.backend == AUTO:
        names += [name for name in BACKENDS.names() if BACKENDS[name].runs_here and not BACKENDS[name].unavailable()]
    kept = [name for name in dict.fromkeys(names) if getattr(BACKENDS[name], "runs_here", False) is here]
    return [name for name in kept if name != main_of(config)]


def build_spec(config: BuildConfig, backend: str | None = None) -> BuildSpec:
    """What a recipe asks of its runtime, or of another `backend`."""
    runtime = BACKENDS[backend or main_of(config)]
    return runtime.spec(config) if hasattr(runtime, "spec") else BuildSpec()


def timed_plan(config: BuildConfig, backend: str | None = None) -> BuildPlan:
    """How engines whose layers are timed are built; what a runtime is not timed with is refused."""
    runtime = BACKENDS[backend or main_of(config)]
    if hasattr(runtime, "check_timed"):
        runtime.check_timed(config)
    return build_spec(config, backend).plan or BuildPlan()


def open_options(config: BuildConfig, backend: str) -> dict[str, Any]:
    """How a run opens what it has built: threads, and where a runtime keeps what it compiles."""
    runtime = BACKENDS[backend]
    more = runtime.open_options(config) if hasattr(runtime, "open_options") else {}
    return {"threads": config.threads, **more}


def inspected(artefact: Path) -> dict[str, Any] | None:
    """What TensorRT's engine inspector said of an engine when it was built, {"Layers": [...], "Bindings": [...]}; None
    for the artefacts of other runtimes."""
    layers = artefact.with_name(artefact.name + ".layers.json")
    if not layers.is_file():
        return None
    found = parse_json(read_text(layers, kind="inspector"), source=str(layers), kind="inspector", finite=False)
    if not isinstance(found, dict):
        raise VssError(f"{layers} holds a {type(found).__name__}; build the engine again.")
    return found


# What an ONNX file does not say of the runtime that it is for.


def float_ops(backend: str) -> dict[str, str]:
    """Op -> why it stays in floating point on a runtime."""
    runtime = BACKENDS[backend]
    why = f"{getattr(runtime, 'title', backend)} runs it in floating point"
    return dict.fromkeys(getattr(runtime, "float_ops", ()), why)


def int8_of(backend: str) -> Int8:
    """How a runtime wants INT8 written; "" is any."""
    return getattr(BACKENDS[backend], "int8", Int8()) if backend else Int8()


def step_for(backends: Iterable[str], precisions: Iterable[str], ops: Set[str]) -> tuple[int, str]:
    """The least channels of which all widths are multiples so that no convolution of `ops` costs an extra kernel in any
    engine, one a runtime and precision; and why."""
    step, reasons, kinds = 1, list[str](), list(precisions)
    for name in dict.fromkeys(map(BACKENDS.canonical, backends)):
        runtime = BACKENDS[name]
        steps = getattr(runtime, "steps", {})
        wanted = {kind: math.lcm(*(n for op, n in steps.get(kind, {}).items() if op in ops)) for kind in kinds}
        step = math.lcm(step, *wanted.values())
        texts = [f"{n} in {listed(k for k in kinds if wanted[k] == n)}" for n in dict.fromkeys(wanted.values())]
        why = getattr(runtime, "steps_why", "it says nothing of widths")
        reasons.append(f"{name} wants {' and '.join(texts)}: {why}")
    return step, "; ".join(reasons)
