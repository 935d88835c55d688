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
]

BACKENDS: Registry[Backend] = Registry("backend")
BACKENDS.add("onnxruntime", OnnxRuntimeBackend(), aliases=["ort"])
BACKENDS.add("tensorrt", TensorRTBackend(), aliases=["trt"])
BACKENDS.add("torch", TorchBackend())


def available(name: str) -> Any:
    """A backend that can run here, or the sentence that says what is missing."""
    backend = BACKENDS[name]
    reason = backend.unavailable()
    if reason:
        raise VssError(reason)
    return backend


def build_spec(config: BuildConfig) -> BuildSpec:
    """What a recipe asks of its runtime; profiles of a TensorRT engine come from the file."""
    if BACKENDS.canonical(config.backend) != "tensorrt":
        return BuildSpec()
    flags = {key: f"{option} (build.tensorrt.{key})" for key, option in OPTIONS.items()}
    plan = parse(BuildPlan, config.tensorrt.model_dump(), source="build.tensorrt", flags=flags)
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
