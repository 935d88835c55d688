"""PyTorch as a runtime: a network behind the bindings of its engine, the baseline of every speed-up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vss.deploy.graph import SegGraph
from vss.deploy.session import Binding, BuildSpec, Session
from vss.errors import VssError

if TYPE_CHECKING:
    from vss.data.transforms import Preprocess


class TorchBackend:
    """PyTorch itself, the baseline of every speed-up. Its artefact is a checkpoint, or a network in memory."""

    name = "torch"

    def unavailable(self) -> str | None:
        """None: torch is what this package is made of."""
        return None

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        """Refused: torch runs checkpoints."""
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
        if not isinstance(artefact, nn.Module):
            if load is None:
                raise VssError(f"the torch backend needs `load`, a function that gives the network in {artefact}.")
            artefact = load(Path(artefact))
        return TorchSession(artefact, threads=threads, **options)


class TorchSession(Session):
    """A network behind the same bindings as its exported engine.

    Args:
        model: SegModel; moved to `device` and set to eval mode.
        size: (H, W) of the input.
        preprocess: when given, the input is uint8 NHWC RGB, else float32 NCHW normalised.
        labels: output `labels` instead of `logits`; they come from `model.predict`, cast to `labels_dtype`.
        threads: torch intra-op threads while it runs; the process setting is put back after every run.
        device: a torch device; feeding and fetching copies are part of `run`.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        *,
        preprocess: Preprocess | None = None,
        labels: bool = False,
        labels_dtype: str = "int32",
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        self._graph = SegGraph(model, preprocess=preprocess, labels=labels, labels_dtype=labels_dtype, native=True)
        self._graph.to(device).eval()
        self._device, self._threads = torch.device(device), threads
        height, width = size
        nhwc, nchw = Binding((None, height, width, 3), "uint8"), Binding((None, 3, height, width), "float32")
        self.inputs = {"image": nchw if preprocess is None else nhwc}
        self.outputs = {
            name: Binding((None, *shape), dtype) for name, (dtype, shape) in self._graph.outputs(size).items()
        }

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode(), _torch_threads(self._threads):
            image = torch.from_numpy(np.ascontiguousarray(feed["image"])).to(self._device)
            found = self._graph(image)
            values = found if isinstance(found, tuple) else (found,)
            return {name: value.cpu().numpy() for name, value in zip(self.outputs, values, strict=True)}

    def describe(self) -> dict[str, Any]:
        """Backend, version, device, threads and the network's name and options."""
        model = self._graph.model
        return {
            "backend": "torch",
            "version": torch.__version__,
            "device": str(self._device),
            "threads": self._threads,
            "metadata": {"model": model.name, "options": model.options},
        }


@contextlib.contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
