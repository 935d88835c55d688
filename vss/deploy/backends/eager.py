"""PyTorch as a runtime: a network behind the bindings of its engine. torch is imported when one is opened."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vss.core.config import BuildConfig
from vss.core.errors import VssError
from vss.deploy import onnx_file
from vss.deploy.backends.base import Binding, BuildSpec, Session

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vss.data.preprocess import Preprocess


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

        if not isinstance(artefact, nn.Module):
            if load is None:
                raise VssError(f"the torch backend needs `load`, a function that gives the network in {artefact}.")
            artefact = load(Path(artefact))
        return TorchSession(artefact, threads=threads, **options)


class TorchSession(Session):
    """A network behind the same bindings as its exported engine.

    Args:
        model: SegModel; set to eval mode. A copy runs where device or precision are not those of the CPU in float32.
        size: (H, W) of the input.
        preprocess: when given, the input is uint8 NHWC RGB, else float32 NCHW normalised.
        labels: output `labels` instead of `logits`; they come from `model.predict`, cast to `labels_dtype`.
        threads: torch intra-op threads while it runs; the process setting is put back after every run.
        device: a torch device; feeding and fetching copies are part of `run`.
        precision: "fp32", or "fp16" (weights and activations, channels last).
        cuda_graph: record the kernels of each input shape once and replay them; needs a CUDA device.

    Attributes:
        graph: the module that runs.
        device, threads: as given.
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
        precision: str = "fp32",
        cuda_graph: bool = False,
    ) -> None:
        import torch

        from vss.deploy.graph import SegGraph

        self.device, self.threads = torch.device(device), threads
        self._options = {"precision": precision, "cuda_graph": cuda_graph}
        check_place(device, precision)
        if cuda_graph and self.device.type != "cuda":
            raise VssError(f"CUDA graphs need a CUDA device, and device is {device}.")
        if (self.device.type, precision) != ("cpu", "fp32"):
            model = copy.deepcopy(model)
        half = precision == "fp16"
        if half:
            model.to(torch.float16).to(memory_format=torch.channels_last)
        self.graph = SegGraph(
            model, preprocess=preprocess, labels=labels, labels_dtype=labels_dtype, native=True, half=half
        )
        self.graph.to(self.device).eval()
        self._stated = {onnx_file.KEY: onnx_file.text_of(preprocess, size)} if preprocess is not None else {}
        self._recorded: dict[tuple[int, ...], tuple[Any, Tensor, Any]] = {}
        height, width = size
        nhwc, nchw = Binding((None, height, width, 3), "uint8"), Binding((None, 3, height, width), "float32")
        self.inputs = {"image": nchw if preprocess is None else nhwc}
        self.outputs = {
            name: Binding((None, *shape), dtype) for name, (dtype, shape) in self.graph.outputs(size).items()
        }

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode(), torch_threads(self.threads):
            image = torch.from_numpy(np.ascontiguousarray(feed["image"])).to(self.device)
            found = self._replay(image) if self._options["cuda_graph"] else self.graph(image)
            values = found if isinstance(found, tuple) else (found,)
            return {name: value.cpu().numpy() for name, value in zip(self.outputs, values, strict=True)}

    def probe(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        graph = copy.copy(self.graph)
        graph.labels = False
        with torch.inference_mode(), torch_threads(self.threads):
            found = graph(torch.from_numpy(np.ascontiguousarray(feed["image"])).to(self.device))
        return {str(i): v.cpu().numpy() for i, v in enumerate(found if isinstance(found, tuple) else (found,))}

    def _replay(self, image: Tensor) -> Any:
        key = tuple(image.shape)
        if key not in self._recorded:
            self._recorded[key] = _record(self.graph, image)
        recorded, source, found = self._recorded[key]
        source.copy_(image)
        recorded.replay()
        return found

    def describe(self) -> dict[str, Any]:
        import torch

        model = self.graph.model
        return {
            "backend": "torch",
            "version": torch.__version__,
            "device": str(self.device),
            "threads": self.threads,
            **self._options,
            "metadata": {"model": model.name, "options": model.options, **self._stated},
        }


def check_place(device: str, precision: str) -> None:
    """Refuse a device that is not there, or a precision that torch does not run here."""
    import torch

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise VssError(f"device is {device} and torch sees no CUDA device; use device cpu.")
    if precision not in ("fp32", "fp16"):
        raise VssError(f"precision is {precision!r}; torch runs fp32 or fp16.")


def _record(graph: nn.Module, image: Tensor) -> tuple[Any, Tensor, Any]:
    """A CUDA graph of one input shape, with the tensors that it reads and writes."""
    import torch

    source, side = image.clone(), torch.cuda.Stream(image.device)
    side.wait_stream(torch.cuda.current_stream(image.device))
    with torch.cuda.stream(side):  # what libraries set up on their first runs must not be recorded
        for _ in range(3):
            graph(source)
    torch.cuda.current_stream(image.device).wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = graph(source)
    return recorded, source, found


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Intra-op threads of torch inside of a `with`; None leaves them."""
    import torch

    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
