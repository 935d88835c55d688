"""From a network to an artefact that runs elsewhere: export, backends, bench, gate. Importing this needs neither onnx
nor torch."""

from vss.deploy.backends import BACKENDS, Backend, Binding, BuildSpec, Session, TorchSession
from vss.deploy.backends.trt_plan import BuildPlan, Span, spans
from vss.deploy.bench import bench, bench_end_to_end
from vss.deploy.export import export

__all__ = [
    "BACKENDS",
    "Backend",
    "Binding",
    "BuildPlan",
    "BuildSpec",
    "Session",
    "Span",
    "TorchSession",
    "bench",
    "bench_end_to_end",
    "export",
    "spans",
]
