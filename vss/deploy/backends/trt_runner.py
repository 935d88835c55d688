"""Runs a TensorRT engine with numpy alone, on memory of pycuda, of cuda-python or of torch.

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
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tensorrt import ICudaEngine, IExecutionContext, IRuntimeCache, IRuntimeConfig


if __package__:
    from .trt_device import Device, Driver, EngineError, Memory, own_memory, sm
    from .trt_flavour import FLAVOURS, TENSORRT, Flavour, gpus
else:  # in a bundle, or in the process of a build
    from trt_device import (  # type: ignore[no-redef]
        Device,
        Driver,
        EngineError,
        Memory,
        own_memory,
        sm,
    )
    from trt_flavour import FLAVOURS, TENSORRT, Flavour, gpus  # type: ignore[no-redef]

LOG = logging.getLogger(__name__)
KIND, SCHEMA = "vss.engine", 2
ALONE = ("trt_runner.py", "trt_device.py", "trt_flavour.py")
"""The files that together need numpy alone."""
NUMPY_NAMES = {"FLOAT": "float32", "HALF": "float16"}
NUMPY_NAMES |= {name: name.lower() for name in ("INT8", "UINT8", "INT32", "INT64", "BOOL")}


def load_tensorrt(flavour: Flavour = TENSORRT) -> ModuleType:
    """Import a TensorRT of a known version, or say what to install. A process holds one flavour."""
    for other in FLAVOURS.values():
        if other.module != flavour.module and other.module in sys.modules:
            raise EngineError(
                f"{other.title} is in use in this process, and a process holds one TensorRT; open the engine of "
                f"{flavour.title} in a process of its own."
            )
    try:
        trt = importlib.import_module(flavour.module)
    except (ImportError, OSError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngineError(f"{flavour.title} cannot be imported ({why}); {flavour.install}.") from error
    if int(trt.__version__.split(".")[0]) not in flavour.majors:
        known = " or ".join(map(str, flavour.majors))
        raise EngineError(f"{flavour.title} {trt.__version__} is installed; expected {known}: {flavour.install}.")
    return trt


def read_about(path: Path) -> dict[str, Any] | None:
    """The JSON beside an engine, or None for an engine from elsewhere; `flavour` and `targets` are always in it."""
    beside = path.with_name(path.name + ".json")
    try:
        if not beside.is_file():
            return None
        about: dict[str, Any] = json.loads(beside.read_text())
        known = about["kind"] == KIND and about["schema"] <= SCHEMA and bool(about["tensorrt"] + about["sha256"])
        about = {"flavour": TENSORRT.name, "targets": []} | about if known else about
        known = known and about["flavour"] in FLAVOURS
        if known and FLAVOURS[about["flavour"]].targets:
            known = all(re.fullmatch(r"sm\d{2,3}", target) for target in about["targets"])
        elif known:
            known = about["plan"]["hardware"] in ("NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS")
            known = known and bool(about["device"]["name"] + "")
            known = known and [type(part) for part in about["device"]["capability"]] == [int, int]
    except (ValueError, RecursionError, OSError, LookupError, TypeError) as error:
        raise EngineError(f"{beside} is damaged ({str(error)[:200]}); build the engine again.") from error
    if not known:
        raise EngineError(f"{beside} is no {KIND} file of schema {SCHEMA} or older; build the engine again.")
    return about


def check_about(path: Path, about: Mapping[str, Any], device: Device, version: str) -> None:
    """Refuse an engine of another GPU or another TensorRT, unless it was built to be moved."""
    flavour = FLAVOURS[about.get("flavour", TENSORRT.name)]
    if flavour.targets:
        _check_targets(path, about, device, flavour)
    else:
        _check_device(path, about, device)
    if about["tensorrt"] == version:
        return
    then, now = ([int(part) for part in each.split(".") if part.isdigit()] for each in (about["tensorrt"], version))
    if not (about["plan"]["version_compatible"] and then <= now and then[0] == now[0]):
        newer = "." if flavour.targets else ", or build it as version compatible for newer ones."
        raise EngineError(
            f"{path} was built by {flavour.title} {about['tensorrt']} and this is {version}; build it again, or "
            f"install that version{newer}"
        )


def _check_targets(path: Path, about: Mapping[str, Any], device: Device, flavour: Flavour) -> None:
    here, built = sm(device.capability), list(about["targets"])
    if here not in flavour.targets:
        serves = f"{', '.join(flavour.targets)}; TensorRT (backend tensorrt) serves others"
        raise EngineError(f"{flavour.title} does not run on {device}; it serves {serves}.")
    if here not in (built or [each for each in flavour.targets if each != "sm75"]):
        raise EngineError(
            f"{path} was built for {gpus(built)} and this is {device}; build it with "
            f"--targets {','.join([*built, here])}."
        )


def _check_device(path: Path, about: Mapping[str, Any], device: Device) -> None:
    built, level = about["device"], about["plan"]["hardware"]
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


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror or error}); expected a file of TensorRT.") from error


def read_engine(path: Path, about: Mapping[str, Any] | None) -> bytes:
    """The bytes of an engine, checked against what was written."""
    blob = _bytes_of(path)
    if about is not None and (len(blob) != about["bytes"] or hashlib.sha256(blob).hexdigest() != about["sha256"]):
        raise EngineError(
            f"{path} is not what was built ({len(blob)} bytes of {about['bytes']}); copy it again, or build it again."
        )
    return blob


class Engine:
    """An engine, ready to run.

    Args:
        path: the engine; the JSON beside it, where there is one, is checked first.
        memory: where tensors live: memory of what is installed, or of torch as in `vss.deploy.backends.trt_session`.
        plugins: libraries with the plugins that the engine holds; they stay loaded.
        cuda_graph: record the launches of each input shape once and replay them.
        runtime_cache: file of the kernels that TensorRT for RTX makes on a GPU when an engine first runs there; it is
            read where there is one and written by `keep_cache` and `close`.
        profile: index of the optimisation profile.
        flavour: of an engine from elsewhere, without a JSON beside it.

    Attributes:
        inputs, outputs: name -> (shape with None for a free dimension, numpy dtype name).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        memory: Callable[[int], Memory] = own_memory,
        device: int = 0,
        plugins: Sequence[Path | str] = (),
        cuda_graph: bool = False,
        runtime_cache: Path | str | None = None,
        profile: int = 0,
        flavour: Flavour = TENSORRT,
    ) -> None:
        path = self._path = Path(path)
        self._driver, self.about = Driver(), read_about(path)
        self.device = self._driver.device(device)
        blob = read_engine(path, self.about)
        self.flavour = FLAVOURS[self.about["flavour"]] if self.about else flavour
        trt = self._trt = load_tensorrt(self.flavour)
        if self.about is not None:
            check_about(path, self.about, self.device, trt.__version__)
        self.memory, self._profile, self.version = memory(device), profile, trt.__version__
        load_plugins(trt, plugins, self.flavour)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        if self.about is not None and self.about["plan"]["version_compatible"]:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(blob)
        if self._engine is None:
            raise EngineError(
                f"{self.flavour.title} {trt.__version__} cannot load {path}; its message is above: build it again."
            )
        self._cache_path = Path(runtime_cache) if runtime_cache else None
        self._config, self._cache = self._configure()
        self._with_graphs = cuda_graph
        self._context = self._new_context()
        self.inputs, self.outputs = self._tensors(trt, "INPUT"), self._tensors(trt, "OUTPUT")
        self._graphs = dict[tuple[tuple[str, tuple[int, ...]], ...], int]()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def _configure(self) -> tuple[IRuntimeConfig | None, IRuntimeCache | None]:
        """How contexts run, and the runtime cache, of a product that compiles on the GPU; None and None of others."""
        if not self.flavour.compiles:
            if self._cache_path:
                raise EngineError(f"{self.flavour.title} keeps no runtime cache; leave {self._cache_path} off.")
            return None, None
        config, cache = self._engine.create_runtime_config(), None
        if self._cache_path:
            cache = config.create_runtime_cache()
            if self._cache_path.is_file() and not cache.deserialize(_bytes_of(self._cache_path)):
                LOG.warning("%s is of another GPU, driver or version and is made again.", self._cache_path)
            config.set_runtime_cache(cache)
        return config, cache

    def keep_cache(self) -> None:
        """Write the kernels that were made so far to the file of the runtime cache, whole or not at all."""
        if self._cache is None or self._cache_path is None:
            return
        unfinished = self._cache_path.with_name(f".{self._cache_path.name}.{os.getpid()}")
        try:
            unfinished.write_bytes(bytes(self._cache.serialize()))
            unfinished.replace(self._cache_path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            why = error.strerror or error
            raise EngineError(
                f"the runtime cache {self._cache_path} cannot be written ({why}); name another."
            ) from error

    def _new_context(self) -> IExecutionContext:
        if self._config is None:
            context = self._engine.create_execution_context()
        else:
            strategies = self._trt.CudaGraphStrategy
            graphs = strategies.WHOLE_GRAPH_CAPTURE if self._with_graphs else strategies.DISABLED
            self._config.cuda_graph_strategy = graphs
            context = self._engine.create_execution_context(self._config)
        if context is None:
            raise EngineError(f"there is not enough memory on {self.device} to run {self._path}; free some of it.")
        if self._profile and not context.set_optimization_profile_async(self._profile, self.memory.stream):
            raise EngineError(f"{self._path} has no optimisation profile {self._profile}.")
        return context

    def _tensors(self, trt: ModuleType, mode: str) -> dict[str, tuple[tuple[int | None, ...], str]]:
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
        if not self._with_graphs or self.flavour.compiles:
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
        return inspect_layers(self._trt, self._engine)

    def close(self) -> None:
        """Write the runtime cache, free graphs, context, engine and memory."""
        try:
            self.keep_cache()
        except EngineError as error:  # what was computed stays good
            LOG.warning("%s", error)
        self._drop_graphs()
        self._context = self._config = self._cache = self._engine = self._runtime = None
        self.memory.close()


def inspect_layers(trt: ModuleType, engine: ICudaEngine) -> dict[str, Any]:
    """The engine inspector's JSON as data: {"Layers": [...], "Bindings": [...]}."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return dict(json.loads(text))


def load_plugins(trt: ModuleType, libraries: Sequence[Path | str], flavour: Flavour = TENSORRT) -> None:
    """Load TensorRT's own plugins and further libraries; none is ever unloaded, since that crashes living objects."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(trt.Logger(trt.Logger.WARNING), "")
    for library in libraries:
        if not Path(library).is_file():
            raise EngineError(f"{library} does not exist; expected a library with TensorRT plugins.")
        _check_major(trt, Path(library), flavour)
        if trt.get_plugin_registry().load_library(str(library)) is None:
            raise EngineError(
                f"{library} holds no plugins for {flavour.title} {trt.__version__}; build it for that version."
            )


def _check_major(trt: ModuleType, library: Path, flavour: Flavour) -> None:
    """Interfaces differ between 10 and 11; a library of ours says what it was built for."""
    try:
        built_for = ctypes.CDLL(str(library)).vssTensorRTMajor
    except (OSError, AttributeError):
        return
    wanted = flavour.plugin_major or int(trt.__version__.split(".")[0])
    if built_for() != wanted:
        raise EngineError(
            f"{library} is built for TensorRT {built_for()}, and {flavour.title} {trt.__version__} takes plugins of "
            f"{wanted}; build it again."
        )
