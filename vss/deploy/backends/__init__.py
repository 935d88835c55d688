"""Runtimes by name. A new one is a file with a `Backend` and one row here; users add theirs to `BACKENDS`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vss.core.config import BuildConfig
from vss.core.errors import VssError, need
from vss.core.files import parse_json, read_text
from vss.core.registry import Registry
from vss.core.yaml12 import parse
from vss.deploy.backends.base import Backend, Binding, BuildSpec, Session
from vss.deploy.backends.eager import TorchBackend, TorchSession
from vss.deploy.backends.ort import OnnxRuntimeBackend, OnnxRuntimeSession
from vss.deploy.backends.trt import TensorRTBackend
from vss.deploy.backends.trt_flavour import TENSORRT, TENSORRT_RTX
from vss.deploy.backends.trt_plan import OPTIONS, BuildPlan

__all__ = [
    "BACKENDS",
    "Backend",
    "Binding",
    "BuildSpec",
    "OnnxRuntimeBackend",
    "OnnxRuntimeSession",
    "Session",
    "TensorRTBackend",
    "TorchBackend",
    "TorchSession",
    "available",
    "build_spec",
    "inspected",
    "need",
    "of_tensorrt",
]

BACKENDS: Registry[Backend] = Registry("backend")
BACKENDS.add("onnxruntime", OnnxRuntimeBackend(), aliases=["ort"])
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


def build_spec(config: BuildConfig, backend: str | None = None) -> BuildSpec:
    """What a recipe asks of its runtime, or of another `backend`; profiles of a TensorRT engine come from the file."""
    runtime = of_tensorrt(backend or config.backend)
    if runtime is None:
        return BuildSpec()
    flags = {key: f"{option} (build.tensorrt.{key})" for key, option in OPTIONS.items()}
    asked = config.tensorrt.model_dump() | ({"targets": config.targets} if runtime.flavour.targets else {})
    plan = parse(BuildPlan, asked, source="build.tensorrt", flags=flags)
    runtime.check(plan)
    return BuildSpec(plan=plan)


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
