"""Runtimes by name. A new one is a file with a `Backend` and one row here; users add theirs to `BACKENDS`."""

from vss.deploy.eager import TorchBackend, TorchSession
from vss.deploy.ort import OnnxRuntimeBackend, OnnxRuntimeSession
from vss.deploy.session import Backend, Binding, BuildSpec, Session, need
from vss.deploy.trt import TensorRTBackend
from vss.registry import Registry

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
    "need",
]

BACKENDS: Registry[Backend] = Registry("backend")
BACKENDS.add("onnxruntime", OnnxRuntimeBackend(), aliases=["ort"])
BACKENDS.add("tensorrt", TensorRTBackend(), aliases=["trt"])
BACKENDS.add("torch", TorchBackend())
