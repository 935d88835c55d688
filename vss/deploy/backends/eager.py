"""PyTorch as a runtime, which is imported when a network is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vss.core.config import BuildConfig
from vss.core.errors import VssError
from vss.deploy.backends.base import BuildSpec, Session

if TYPE_CHECKING:
    from torch import nn


class TorchBackend:
    """PyTorch itself, the baseline of every speed-up. Its artefact is a checkpoint, or a network in memory."""

    name, title, packages = "torch", "PyTorch", ("torch",)
    devices, precisions, beside_int8, runs_here = ("cpu", "cuda"), ("fp32", "fp16"), "fp32", False
    steps: ClassVar = {"fp16": {"Conv": 8, "ConvTranspose": 8}}
    steps_why = "tensor cores take eight half-precision channels at once, and nothing else is padded"

    def unavailable(self) -> str | None:
        return None

    def spec(self, config: BuildConfig) -> BuildSpec:
        """Nothing is built."""
        return BuildSpec()

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        raise VssError(f"the torch backend runs checkpoints, it does not build {onnx}; use backend onnxruntime.")

    def open(
        self,
        artefact: Any,
        *,
        threads: int | None = None,
        load: Callable[[Path], nn.Module] | None = None,
        **options: Any,
    ) -> Session:
        """Open a network, or a checkpoint through `load`. Other options: those of `TorchSession`."""
        from torch import nn

        from vss.deploy.backends.eager_session import TorchSession

        if not isinstance(artefact, nn.Module):
            if load is None:
                raise VssError(f"the torch backend needs `load`, a function that gives the network in {artefact}.")
            artefact = load(Path(artefact))
        return TorchSession(artefact, threads=threads, **options)
