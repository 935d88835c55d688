"""A driver of a few lines of C, and the three memories on host arrays, for engines that double their input.

Device memory is host memory here; everything between the feed and the addresses that TensorRT is given is the real
code, on the real classes of the bindings.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import Log, Tensors, trt

from vss.deploy.backends import trt_session as sessions

LIBCUDA = """
#include <string.h>
typedef void (*Replay)(int);
static Replay replay; static int graphs, capturing, live, devices = 1;
void set_replay(Replay r) { replay = r; }
void set_devices(int n) { devices = n; }
int is_capturing(void) { return capturing; }
int live_graphs(void) { return live; }
int graph_count(void) { return graphs; }
int cuInit(unsigned f) { return f ? 1 : devices < 0 ? 999 : 0; }
int cuDeviceGetCount(int* n) { *n = devices; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetName(char* t, int n, int d) { (void)d; strncpy(t, "NVIDIA L4", n); return 0; }
int cuDeviceTotalMem_v2(size_t* b, int d) { (void)d; *b = (size_t)23034 << 20; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { (void)d; *v = a == 75 ? 8 : a == 76 ? 9 : -1; return 0; }
int cuStreamBeginCapture_v2(void* s, int mode) { if (!s || mode != 1) return 1; capturing = 1; return 0; }
int cuStreamEndCapture(void* s, void** g) { if (!s) return 1; capturing = 0; *g = (void*)1; return 0; }
int cuGraphInstantiateWithFlags(void** e, void* g, unsigned long long f) {
    if (!g || f) return 1; *e = (void*)(size_t)(++graphs); ++live; return 0;
}
int cuGraphDestroy(void* g) { return g ? 0 : 1; }
int cuGraphExecDestroy(void* e) { --live; return e ? 0 : 1; }
int cuGraphLaunch(void* e, void* s) { if (!s) return 1; replay((int)(size_t)e); return 0; }
"""
SHAPES = ((1, 4), (2, 4), (8, 4))


def double(tensors: Tensors, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    """What the engine computes: y = 2 x, float32 (n, 4)."""
    count = int(np.prod(shapes["x"]))
    source = np.ctypeslib.as_array((ctypes.c_float * count).from_address(addresses["x"]))
    np.ctypeslib.as_array((ctypes.c_float * count).from_address(addresses["y"]))[:] = 2 * source


class Gpu:
    """The stub driver, and an engine that can be recorded into its graphs."""

    def __init__(self, library: Path) -> None:
        self.cuda, self.log = ctypes.CDLL(str(library)), Log()
        self.tensors = Tensors({"x": (trt.DataType.FLOAT, SHAPES)}, {"y": (trt.DataType.FLOAT, lambda s: s["x"])})
        self.recorded: list[Callable[[], None]] = []
        self.enqueued = self.replayed = 0
        self.works, self.first = True, self.cuda.graph_count()  # the library counts on from test to test
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._replay = kind(self.replay)
        self.cuda.set_replay(self._replay)
        self.cuda.set_devices(1)

    def run(self, tensors: Tensors, stream: int) -> bool:
        shapes, addresses = dict(tensors.shapes), dict(tensors.addresses)
        if self.cuda.is_capturing():
            self.recorded.append(lambda: double(tensors, shapes, addresses))
        else:
            self.enqueued += 1
            double(tensors, shapes, addresses)
        return self.works

    def replay(self, number: int) -> None:
        self.replayed += 1
        self.recorded[number - 1 - self.first]()


class HostTorch(sessions.TorchMemory):
    """The torch memory on host tensors."""

    def __init__(self, index: int = 0) -> None:
        self._device, self.stream, self._buffers = torch.device("cpu"), 77, {}
        self._stream = types.SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)


class FakePycuda(types.ModuleType):
    """The part of pycuda.driver that is used, on host memory; every call is remembered."""

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.calls: list[str] = []
        self._kept: list[np.ndarray] = []

    def init(self) -> None:
        self.calls.append("init")

    def Device(self, index: int) -> Any:  # noqa: N802
        push, pop = (lambda word=word: self.calls.append(word) for word in ("push", "pop"))
        return types.SimpleNamespace(retain_primary_context=lambda: types.SimpleNamespace(push=push, pop=pop))

    def Stream(self) -> Any:  # noqa: N802
        return types.SimpleNamespace(handle=99, synchronize=lambda: self.calls.append("synchronize"))

    def mem_alloc(self, size: int) -> int:
        self._kept.append(np.zeros(size, np.uint8))
        return self._kept[-1].ctypes.data

    def pagelocked_empty(self, size: int, dtype: Any) -> np.ndarray:
        return np.empty(size, dtype)

    def memcpy_htod_async(self, target: int, source: np.ndarray, stream: Any) -> None:
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def memcpy_dtoh_async(self, target: np.ndarray, source: int, stream: Any) -> None:
        ctypes.memmove(target.ctypes.data, source, target.nbytes)


class FakeCudaRuntime(types.ModuleType):
    """cuda.bindings.runtime on host memory: names, enums and numbers of arguments are those of the real module."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.real = importlib.import_module("cuda.bindings.runtime")
        self.calls: list[str] = []
        self.kept: dict[int, np.ndarray] = {}
        self.refuses = ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.real, name)
        if isinstance(real, type):
            return real
        (wanted,) = re.findall(rf"^{name}\((.*?)\)", real.__doc__)

        def call(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == len([part for part in wanted.split(",") if part]), (name, wanted, arguments)
            self.calls.append(name)
            if name == self.refuses:
                return (self.real.cudaError_t.cudaErrorMemoryAllocation, None)
            found = getattr(self, f"_{name}")(*arguments)
            return (self.real.cudaError_t.cudaSuccess, *([] if found is None else [found]))

        return call

    def _cudaSetDevice(self, index: int) -> None:  # noqa: N802
        assert index == 0

    def _cudaStreamCreate(self) -> Any:  # noqa: N802
        return self.real.cudaStream_t(88)

    def _cudaMalloc(self, size: int) -> int:  # noqa: N802
        made = np.zeros(size, np.uint8)
        self.kept[made.ctypes.data] = made
        return made.ctypes.data

    _cudaMallocHost = _cudaMalloc  # noqa: N815

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> None:  # noqa: N802
        assert isinstance(kind, self.real.cudaMemcpyKind) and int(stream) == 88
        assert size <= self.kept[target].nbytes and size <= self.kept[source].nbytes
        ctypes.memmove(target, source, size)

    def _cudaStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        assert int(stream) == 88

    _cudaStreamDestroy = _cudaStreamSynchronize  # noqa: N815

    def _cudaFree(self, address: int) -> None:  # noqa: N802
        del self.kept[address]

    _cudaFreeHost = _cudaFree  # noqa: N815
