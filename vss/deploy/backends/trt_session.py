"""TensorRT behind the interface of every other session, on torch tensors, on pycuda or on cuda-python."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vss.core.errors import VssError
from vss.deploy.backends.base import Binding, Session, sentences
from vss.deploy.backends.trt_device import CudaPythonMemory, EngineError, PycudaMemory
from vss.deploy.backends.trt_runner import Engine


class ProfiledEngine(Engine):
    """An engine that can also say how long each of its layers takes."""

    def profile(self, feed: Mapping[str, object], runs: int) -> dict[str, list[float]]:
        """Engine layer -> milliseconds of every run, by TensorRT's profiler in a context of its own."""
        trt, times = self._trt, defaultdict[str, list[float]](list)

        def report_layer_time(profiler: object, layer_name: str, ms: float) -> None:
            times[layer_name].append(float(ms))

        profiler = type("Profiler", (trt.IProfiler,), {"report_layer_time": report_layer_time})()
        usual = self._context, self._with_graphs
        self._with_graphs = False
        try:
            self._context = self._new_context()  # without graphs, whose layers have no times
            self._forget()
            self._context.profiler = profiler
            for _ in range(runs):
                self.execute(feed)
                self.memory.synchronise()
        finally:
            self._context, self._with_graphs = usual
            self._forget()
        return dict(times)

    def _forget(self) -> None:
        self._drop_graphs()
        self._shapes, self._addresses = {}, {}


class TorchMemory:
    """Buffers that are torch tensors, on a stream of their own: a `Memory` of the runner."""

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise EngineError("this torch sees no CUDA device; open the engine with memory='pycuda', or repair torch.")
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        self.stream = int(self._stream.cuda_stream)
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, name: str, size: int) -> int:
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(max(size, 1), dtype=torch.uint8, device=self._device)
        return self._buffers[name].data_ptr()

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A buffer as a tensor, without a copy."""
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return self._buffers[name][: math.prod(shape) * kind.itemsize].view(kind).view(shape)

    def upload(self, name: str, values: object) -> None:
        """Takes a torch tensor too."""
        source = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        dtype = str(source.dtype).removeprefix("torch.")
        with torch.cuda.stream(self._stream):
            self.tensor(name, tuple(source.shape), dtype).copy_(source, non_blocking=True)

    def download(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        with torch.cuda.stream(self._stream):
            return self.tensor(name, shape, dtype).to("cpu", non_blocking=True).numpy()

    def synchronise(self) -> None:
        self._stream.synchronize()

    def after_current(self) -> None:
        """Let the stream wait for what torch has been asked to do."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def before_current(self) -> None:
        """Let torch's current stream wait for this one."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def close(self) -> None:
        self._buffers.clear()


class TensorRTSession(Session):
    """An opened engine on "torch", "pycuda" or "cuda-python" memory; `options` are device, plugins, cuda_graph,
    runtime_cache and profile of `Engine`.
    """

    def __init__(self, path: Path, *, memory: str = "torch", **options: Any) -> None:
        memories: dict[str, Any] = {"torch": TorchMemory, "pycuda": PycudaMemory, "cuda-python": CudaPythonMemory}
        if memory not in memories:
            raise VssError(f"memory is {memory!r}; expected one of {', '.join(memories)}.")
        self._options = {"memory": memory, "cuda_graph": bool(options.get("cuda_graph", False))}
        self._path = path
        with sentences():
            self._engine = ProfiledEngine(path, memory=memories[memory], **options)
        self.inputs = {name: Binding(*each) for name, each in self._engine.inputs.items()}
        self.outputs = {name: Binding(*each) for name, each in self._engine.outputs.items()}

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with sentences():
            return self._engine.run(feed)

    def run_tensors(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on tensors of the device; nothing passes through the host. Ordered with torch's current stream."""
        memory = self._engine.memory
        if not isinstance(memory, TorchMemory):
            raise VssError("run_tensors needs a session that was opened with memory='torch'.")
        with sentences():
            memory.after_current()
            shapes = self._engine.execute(feed)
            memory.before_current()
        return {name: memory.tensor(name, shapes[name], each.dtype).clone() for name, each in self.outputs.items()}

    def profile(self, feed: Mapping[str, np.ndarray], runs: int) -> dict[str, list[float]]:
        """Milliseconds of every engine layer in each of some runs, by TensorRT's profiler; `run` is left as it was."""
        with sentences():
            return self._engine.profile(feed, runs)

    def layers(self, feed: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """What the engine inspector says; it does not depend on a feed."""
        return self._engine.layers()

    def describe(self) -> dict[str, Any]:
        """Backend, version, device, options, hash, size and metadata of the ONNX it was built from."""
        about = self._engine.about or {}
        return {
            "backend": self._engine.flavour.name,
            "version": self._engine.version,
            "device": str(self._engine.device),
            "threads": None,
            **self._options,
            "artefact_sha256": about.get("sha256"),
            "artefact_bytes": self._path.stat().st_size,
            "plan": about.get("plan"),
            "metadata": dict(about.get("metadata", {})),
        }

    def close(self) -> None:
        self._engine.close()
