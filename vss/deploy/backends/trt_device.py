"""The GPU as the driver knows it, and device memory of pycuda or cuda-python: what running an engine needs of CUDA.

This file stands alone, as `trt_runner` does: the standard library and numpy, so that both can be shipped in a bundle.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

CAPABILITY_MAJOR, CAPABILITY_MINOR, THREAD_LOCAL = 75, 76, 1  # CUdevice_attribute (two), CUstreamCaptureMode


class EngineError(ValueError):
    """Bad input: one sentence that says what came, what was expected and what to do."""


@dataclass(frozen=True)
class Device:
    """A GPU as the driver knows it: index, name, compute capability such as (8, 9), memory in MiB."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_mib: int

    def __str__(self) -> str:
        return f"{self.name} (sm {self.capability[0]}{self.capability[1]})"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "capability": list(self.capability), "memory_mib": self.memory_mib}


def sm(capability: Sequence[int]) -> str:
    """A compute capability as targets are called: (8, 9) is sm89."""
    return f"sm{capability[0]}{capability[1]}"


class Driver:
    """The few calls of libcuda that need no context of their own: looking at devices, capturing, launching graphs."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._cuda = ctypes.CDLL(name)
        except OSError as error:
            raise EngineError(
                f"TensorRT needs an NVIDIA GPU and its driver, and there is no {name} here; run this on a GPU machine."
            ) from error
        self._call("cuInit", 0)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._cuda, function)(*arguments)
        if code:
            raise EngineError(f"the NVIDIA driver refuses {function} (CUDA error {code}); check nvidia-smi.")

    def device(self, index: int = 0) -> Device:
        """Look at a device; no context is made."""
        count, handle = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= index < count.value:
            raise EngineError(f"device {index} was asked for and {count.value} are visible; see CUDA_VISIBLE_DEVICES.")
        self._call("cuDeviceGet", ctypes.byref(handle), index)
        text, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        self._call("cuDeviceGetName", text, len(text), handle)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
        numbers = []
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
            number = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(number), attribute, handle)
            numbers.append(number.value)
        return Device(index, text.value.decode(), (numbers[0], numbers[1]), memory.value >> 20)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what `work` puts on a stream; returns the handle of an executable graph."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), THREAD_LOCAL)
        try:
            work()
        finally:
            self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)
        return int(executable.value or 0)

    def launch(self, executable: int, stream: int) -> None:
        self._call("cuGraphLaunch", ctypes.c_void_p(executable), ctypes.c_void_p(stream))

    def destroy(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", ctypes.c_void_p(executable))


class Memory(Protocol):
    """Device memory and a stream of one engine; a buffer belongs to a tensor name."""

    stream: int

    def reserve(self, name: str, size: int) -> int:
        """At least so many bytes for a tensor; returns the device address, which moves only when it grows."""

    def upload(self, name: str, values: object) -> None:
        """Copy a contiguous array into its buffer, on the stream."""

    def download(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Copy a buffer to the host, on the stream; valid after `synchronise`."""

    def synchronise(self) -> None: ...

    def close(self) -> None: ...


def need_module(name: str, package: str) -> ModuleType:
    """Import what brings device memory, or say what to install."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise EngineError(f"this needs {package} ({error}); on a GPU machine: pip install {package}.") from error


def own_memory(index: int = 0) -> Memory:
    """Memory of what is installed: pycuda, else cuda-python."""
    reasons = []
    for kind in (PycudaMemory, CudaPythonMemory):
        try:
            importlib.import_module(kind.module)
        except (ImportError, OSError) as error:
            reasons.append(str(error))
            continue
        return kind(index)
    raise EngineError(f"an engine runs on memory of pycuda or cuda-python ({'; '.join(reasons)}); pip install either.")


class PycudaMemory:
    """Memory of pycuda in the device's primary context, which TensorRT uses as well; host copies are page-locked."""

    module = "pycuda.driver"

    def __init__(self, index: int = 0) -> None:
        self._drv = need_module(self.module, "pycuda")
        self._drv.init()
        self._context = self._drv.Device(index).retain_primary_context()
        self._context.push()
        self._stream = self._drv.Stream()
        self.stream = int(self._stream.handle)
        self._device: dict[str, Any] = {}
        self._host: dict[str, np.ndarray] = {}

    def reserve(self, name: str, size: int) -> int:
        if name not in self._host or self._host[name].nbytes < size:
            self._device[name] = self._drv.mem_alloc(max(size, 1))
            self._host[name] = self._drv.pagelocked_empty(max(size, 1), np.uint8)
        return int(self._device[name])

    def upload(self, name: str, values: Any) -> None:
        host = self._host[name][: values.nbytes]
        host[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._drv.memcpy_htod_async(self._device[name], host, self._stream)

    def download(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        host = self._host[name][: math.prod(shape) * np.dtype(dtype).itemsize]
        self._drv.memcpy_dtoh_async(host, self._device[name], self._stream)
        return host.view(dtype).reshape(shape)

    def synchronise(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._device.clear()
        self._host.clear()
        self._context.pop()


class CudaPythonMemory:
    """Memory of cuda-python (NVIDIA's bindings of the CUDA runtime) on the device that it makes the current one; host
    copies are page-locked."""

    module = "cuda.bindings.runtime"

    def __init__(self, index: int = 0) -> None:
        self._cuda = need_module(self.module, "cuda-python")
        self._call("cudaSetDevice", index)
        self._stream = self._call("cudaStreamCreate")
        self.stream = int(self._stream)
        self._device: dict[str, int] = {}
        self._pinned: dict[str, int] = {}
        self._host: dict[str, np.ndarray] = {}

    def _call(self, function: str, *arguments: object) -> Any:
        code, *found = getattr(self._cuda, function)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"CUDA refuses {function} ({code.name}); check nvidia-smi.")
        return found[0] if found else None

    def reserve(self, name: str, size: int) -> int:
        if name not in self._host or self._host[name].nbytes < size:
            self._free(name)
            size = max(size, 1)
            self._device[name] = int(self._call("cudaMalloc", size))
            self._pinned[name] = int(self._call("cudaMallocHost", size))
            self._host[name] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._pinned[name]))
        return self._device[name]

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        kinds = self._cuda.cudaMemcpyKind
        self._call("cudaMemcpyAsync", target, source, size, getattr(kinds, kind), self._stream)

    def upload(self, name: str, values: Any) -> None:
        self._host[name][: values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._copy(self._device[name], self._pinned[name], values.nbytes, "cudaMemcpyHostToDevice")

    def download(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        host = self._host[name][: math.prod(shape) * np.dtype(dtype).itemsize]
        self._copy(self._pinned[name], self._device[name], host.nbytes, "cudaMemcpyDeviceToHost")
        return host.view(dtype).reshape(shape)

    def synchronise(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def _free(self, name: str) -> None:
        self._host.pop(name, None)
        for owned, function in ((self._device, "cudaFree"), (self._pinned, "cudaFreeHost")):
            if name in owned:
                self._call(function, owned.pop(name))

    def close(self) -> None:
        for name in {*self._device, *self._pinned}:
            self._free(name)
        self._call("cudaStreamDestroy", self._stream)
