"""Runs a TensorRT engine with numpy alone, on memory of pycuda or of torch.

This file stands alone on purpose: it imports the standard library and numpy, so that it can be shipped beside an engine
to a machine without torch and without this package. `tensorrt`, `pycuda` and the driver are looked for when an engine
is opened, in this order: device, file, versions, and `trt.Runtime` last, since without a device that call gives an
object which crashes the process later.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

KIND, SCHEMA = "vss.engine", 1
MAJORS = (10, 11)
INSTALL = "pip install tensorrt-cu13 (CUDA 13 driver) or tensorrt-cu12 (CUDA 12); on Jetson it comes with JetPack"
NUMPY_NAMES = {"FLOAT": "float32", "HALF": "float16"}
NUMPY_NAMES |= {name: name.lower() for name in ("INT8", "UINT8", "INT32", "INT64", "BOOL")}
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

    def _call(self, function: str, *arguments: Any) -> None:
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


def load_tensorrt() -> Any:
    """Import TensorRT 10 or 11, or say what to install."""
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngineError(f"TensorRT cannot be imported ({why}); {INSTALL}.") from error
    if int(trt.__version__.split(".")[0]) not in MAJORS:
        raise EngineError(f"TensorRT {trt.__version__} is installed; expected 10 or 11: {INSTALL}.")
    return trt


def read_about(path: Path) -> dict[str, Any] | None:
    """The JSON beside an engine, or None for an engine from elsewhere."""
    beside = path.with_name(path.name + ".json")
    try:
        if not beside.is_file():
            return None
        about: dict[str, Any] = json.loads(beside.read_text())
        known = about["kind"] == KIND and about["schema"] <= SCHEMA and about["tensorrt"] + about["device"]["name"]
        known = known and about["plan"]["hardware"] in ("NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS")
        major, minor = about["device"]["capability"] if known else (0, 0)
    except (ValueError, RecursionError, OSError, LookupError, TypeError) as error:
        raise EngineError(f"{beside} is damaged ({str(error)[:200]}); build the engine again.") from error
    if not known or type(major) is not int or type(minor) is not int:
        raise EngineError(f"{beside} is no {KIND} file of schema {SCHEMA} or older; build the engine again.")
    return about


def check_about(path: Path, about: Mapping[str, Any], device: Device, version: str) -> None:
    """Refuse an engine of another GPU or another TensorRT, unless it was built to be moved."""
    built, plan, level = about["device"], about["plan"], about["plan"]["hardware"]
    here, there = list(device.capability), list(built["capability"])
    fits = {
        "NONE": here == there and device.name == built["name"],
        "SAME_COMPUTE_CAPABILITY": here == there,
        "AMPERE_PLUS": here >= [8, 0],
    }[level]
    if not fits:
        raise EngineError(
            f"{path} was built on {built['name']} (sm {there[0]}{there[1]}, hardware compatibility {level}) and this "
            f"is {device}; build it here, or with hardware compatibility AMPERE_PLUS there."
        )
    if about["tensorrt"] == version:
        return
    then, now = ([int(part) for part in each.split(".") if part.isdigit()] for each in (about["tensorrt"], version))
    if not (plan["version_compatible"] and then <= now and then[0] == now[0]):
        raise EngineError(
            f"{path} was built by TensorRT {about['tensorrt']} and this is {version}; build it again, or install "
            "that version, or build it as version compatible for newer ones."
        )


def read_engine(path: Path, about: Mapping[str, Any] | None) -> bytes:
    """The bytes of an engine, checked against what was written."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror or error}); expected a TensorRT engine.") from error
    if about is not None and (len(blob) != about["bytes"] or hashlib.sha256(blob).hexdigest() != about["sha256"]):
        raise EngineError(
            f"{path} is not what was built ({len(blob)} bytes of {about['bytes']}); copy it again, or build it again."
        )
    return blob


class Memory(Protocol):
    """Device memory and a stream of one engine; a buffer belongs to a tensor name."""

    stream: int

    def reserve(self, name: str, size: int) -> int:
        """At least so many bytes for a tensor; returns the device address, which moves only when it grows."""

    def upload(self, name: str, values: Any) -> None:
        """Copy a contiguous array into its buffer, on the stream."""

    def download(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Copy a buffer to the host, on the stream; valid after `synchronise`."""

    def synchronise(self) -> None: ...

    def close(self) -> None: ...


class PycudaMemory:
    """Memory of pycuda in the device's primary context, which TensorRT uses as well; host copies are page-locked."""

    def __init__(self, index: int = 0) -> None:
        try:
            self._drv = importlib.import_module("pycuda.driver")
        except (ImportError, OSError) as error:
            raise EngineError(f"this needs pycuda ({error}); on a GPU machine: pip install pycuda.") from error
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


class Engine:
    """An engine, ready to run.

    Args:
        path: the engine; the JSON beside it, where there is one, is checked first.
        memory: where tensors live: `PycudaMemory`, or the torch one of `vss.deploy.backends.trt_session`.
        plugins: libraries with the plugins that the engine holds; they stay loaded.
        cuda_graph: record the launches of each input shape once and replay them.
        profile: index of the optimisation profile.

    Attributes:
        inputs, outputs: name -> (shape with None for a free dimension, numpy dtype name).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        memory: Callable[[int], Memory] = PycudaMemory,
        device: int = 0,
        plugins: Sequence[Path | str] = (),
        cuda_graph: bool = False,
        profile: int = 0,
    ) -> None:
        path = self._path = Path(path)
        self._driver, self.about = Driver(), read_about(path)
        self.device = self._driver.device(device)
        blob = read_engine(path, self.about)
        trt = load_tensorrt()
        if self.about is not None:
            check_about(path, self.about, self.device, trt.__version__)
        self.memory, self._profile, self.version = memory(device), profile, trt.__version__
        load_plugins(trt, plugins)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        if self.about is not None and self.about["plan"]["version_compatible"]:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(blob)
        if self._engine is None:
            raise EngineError(f"TensorRT {trt.__version__} cannot load {path}; its message is above: build it again.")
        self._context = self._new_context()
        self.inputs, self.outputs = self._tensors(trt, "INPUT"), self._tensors(trt, "OUTPUT")
        self._with_graphs, self._graphs = cuda_graph, dict[Any, int]()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(f"there is not enough memory on {self.device} to run {self._path}; free some of it.")
        if self._profile and not context.set_optimization_profile_async(self._profile, self.memory.stream):
            raise EngineError(f"{self._path} has no optimisation profile {self._profile}.")
        return context

    def _tensors(self, trt: Any, mode: str) -> dict[str, tuple[tuple[int | None, ...], str]]:
        found = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if self._engine.get_tensor_mode(name) != getattr(trt.TensorIOMode, mode):
                continue
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in NUMPY_NAMES:
                raise EngineError(f"tensor {name!r} is {kind}, which numpy has not; export it as float32 or float16.")
            shape = tuple(None if side < 0 else int(side) for side in self._engine.get_tensor_shape(name))
            found[name] = (shape, NUMPY_NAMES[kind])
        return found

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays of the right dtypes in, arrays out; both on the host."""
        self.execute(feed)
        found = {n: self.memory.download(n, self._shapes[n], dtype) for n, (_, dtype) in self.outputs.items()}
        self.memory.synchronise()
        return {name: np.array(value) for name, value in found.items()}

    def execute(self, feed: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Upload and launch; the outputs stay in device memory. Returns the shape of every tensor."""
        self._check(feed)
        self._bind({name: tuple(values.shape) for name, values in feed.items()})
        for name, values in feed.items():
            self.memory.upload(name, values)
        self._launch()
        return dict(self._shapes)

    def _check(self, feed: Mapping[str, Any]) -> None:
        if feed.keys() != self.inputs.keys():
            raise EngineError(f"the engine takes the inputs {sorted(self.inputs)}, got {sorted(feed)}.")
        for name, values in feed.items():
            shape, dtype = self.inputs[name]
            got = str(values.dtype).removeprefix("torch.")
            if got != dtype or len(values.shape) != len(shape):
                raise EngineError(
                    f"input {name!r} takes {dtype} of {len(shape)} dimensions, got {got} {tuple(values.shape)}: "
                    "convert it first."
                )

    def _bind(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tell the context shapes and addresses; nothing to do while the shapes stay."""
        if all(self._shapes.get(name) == shape for name, shape in shapes.items()):
            return
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                low, _, high = (tuple(each) for each in self._engine.get_tensor_profile_shape(name, self._profile))
                raise EngineError(
                    f"input {name!r} is {shape}; this engine takes {low} to {high}: build it for that shape."
                )
        known = shapes | {name: tuple(self._context.get_tensor_shape(name)) for name in self.outputs}
        for name, shape in known.items():
            if min(shape, default=0) < 0:
                raise EngineError(f"output {name!r} has a shape that depends on the data, {shape}; export without it.")
            _, dtype = (self.inputs | self.outputs)[name]
            address = self.memory.reserve(name, math.prod(shape) * np.dtype(dtype).itemsize)
            if self._addresses.get(name) != address:
                self._drop_graphs()
                self._addresses[name] = address
            self._context.set_tensor_address(name, address)
        self._shapes = known

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self.memory.stream):
            raise EngineError("TensorRT could not run the engine; its message is above.")

    def _launch(self) -> None:
        if not self._with_graphs:
            return self._enqueue()
        key = tuple(sorted(self._shapes.items()))
        if key not in self._graphs:
            self._enqueue()  # what TensorRT sets up on a first run must not be recorded
            self.memory.synchronise()
            self._graphs[key] = self._driver.capture(self.memory.stream, self._enqueue)
        self._driver.launch(self._graphs[key], self.memory.stream)

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self._driver.destroy(graph)
        self._graphs.clear()

    def layers(self) -> dict[str, Any]:
        return inspect_layers(load_tensorrt(), self._engine)

    def close(self) -> None:
        """Free graphs, context, engine and memory."""
        self._drop_graphs()
        self._context = self._engine = self._runtime = None
        self.memory.close()


def inspect_layers(trt: Any, engine: Any) -> dict[str, Any]:
    """The engine inspector's JSON as data: {"Layers": [...], "Bindings": [...]}."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return dict(json.loads(text))


def load_plugins(trt: Any, libraries: Sequence[Path | str]) -> None:
    """Load TensorRT's own plugins and further libraries; none is ever unloaded, since that crashes living objects."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(trt.Logger(trt.Logger.WARNING), "")
    for library in libraries:
        if not Path(library).is_file():
            raise EngineError(f"{library} does not exist; expected a library with TensorRT plugins.")
        _check_major(trt, Path(library))
        if trt.get_plugin_registry().load_library(str(library)) is None:
            raise EngineError(f"{library} holds no plugins for TensorRT {trt.__version__}; build it for that version.")


def _check_major(trt: Any, library: Path) -> None:
    """Interfaces differ between 10 and 11; a library of ours says what it was built for."""
    try:
        built_for = ctypes.CDLL(str(library)).vssTensorRTMajor
    except (OSError, AttributeError):
        return
    if built_for() != int(trt.__version__.split(".")[0]):
        raise EngineError(f"{library} is built for TensorRT {built_for()}, this is {trt.__version__}; build it again.")
