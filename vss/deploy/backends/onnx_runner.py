"""Runs an ONNX file in ONNX Runtime or in OpenVINO, with numpy and that runtime alone.

This file stands alone on purpose: it is shipped beside an engine, and beside the model of a server, to machines without
torch and without this package.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from openvino import CompiledModel, Core, InferRequest, Model, Output


T = TypeVar("T")
LOG = logging.getLogger(__name__)
RUNTIME = "vss.runtime"
"""Metadata of a file that was built for another runtime than onnxruntime: JSON, `backend` and its settings."""
KIND, SCHEMA, HASHES = "vss.compiled", 1, "hashes.json"
CAPABILITY = {"bf16": "BF16", "f16": "FP16"}
VIRTUAL = ("AUTO", "HETERO", "MULTI")
ON_CPU = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
"""One image after another; threads stay on the cores that the process has."""
Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class EngineError(ValueError):
    """Bad input: one sentence that says what came, what was expected and what to do."""


def module(name: str) -> ModuleType:
    """A runtime's module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineError(f"the engine needs {name} ({error}); run: pip install {name}") from error


def openvino_core() -> Core:
    """OpenVINO's Core, one for the whole process and never freed.

    A Core of 2026.4 gives its thread a stack for signal handlers and takes it back when it is freed. Of two that are
    freed in the order in which they were made, the second puts the first one's stack in its place, which is gone, and
    the next signal that Python handles (Ctrl-C, the end of a data loader's worker) ends the process.
    """
    return _kept(module("openvino").Core)


@functools.cache
def _kept(make: Callable[[], T]) -> T:
    return make()


class OnnxRuntimeEngine:
    """An ONNX file on the CPU, or on CUDA with `provider` "cuda".

    `threads` of None is one per core; `as_written` leaves the graph as it is.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, provider: str = "cpu", as_written: bool = False
    ) -> None:
        ort = module("onnxruntime")
        name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
        if name not in ort.get_available_providers():
            raise EngineError(f"this onnxruntime has no {name}; run: pip install onnxruntime-gpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        if as_written:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session: InferenceSession = ort.InferenceSession(str(path), options, providers=[name])

    def __call__(self, feed: Mapping[str, np.ndarray], names: Sequence[str]) -> Arrays:
        """Outputs of a batch."""
        return dict(zip(names, self.session.run(list(names), dict(feed)), strict=True))

    def reserve(self, batch: int) -> None:
        """Nothing to do: batches of every size run in one session."""

    def close(self) -> None:
        """Free the session."""
        self.session = None


class OpenVINOEngine:
    """An ONNX file on a device of OpenVINO.

    Args:
        path: the file, all of it.
        threads: on a CPU; None leaves the choice to OpenVINO.
        device, precision: None is what the file says of itself, else the CPU in float32.
        cache: folder of compiled models; one that is damaged, or of another version, is made again.
        most: batch sizes that have a compiled model of their own, which is the fastest; further ones share one.
        name: that sentences give to the file.
        key: that sentences give to the device.

    Attributes:
        inputs: name -> (shape with None for a free dimension, numpy dtype name).
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        cache: Path | str | None = None,
        most: int = 8,
        name: Path | None = None,
        key: str = "--device",
    ) -> None:
        self.core, self.path, self._data = openvino_core(), name or path, path.read_bytes()
        model = self.read()
        about = said(model, self.path) if device is None or precision is None else {}
        self.device, self.precision = device or about["device"], precision or about["precision"]
        check_device(self.core, self.device, key)
        check_precision(self.core, self.device, self.precision)
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self.precision}
        if self.device.startswith("CPU"):
            self._settings |= ON_CPU | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self._cache = cache and cache_folder(Path(cache), self._data)
        self.inputs = {port.any_name: binding(port) for port in model.inputs}
        self._most = most
        self._requests: dict[tuple[tuple[int, ...], ...], InferRequest] = {}
        self._fixed = all(None not in shape[1:] for shape, _ in self.inputs.values())
        self.reserve(1)  # so that what cannot be compiled is refused now

    def read(self) -> Model:
        """The file as OpenVINO's own graph; the operators that it has not are named."""
        try:
            return flat_argmax(self.core.read_model(self._data))
        except RuntimeError as error:
            _, found, ops = str(error).partition("No conversion rule found for operations:")
            if found:
                names = sorted(name.strip() for name in ops.strip().splitlines()[0].split(","))
                raise EngineError(
                    f"OpenVINO cannot do {listed(names)} of {self.path}; use --backend onnxruntime (build.backend)."
                ) from error
            raise EngineError(f"OpenVINO cannot read {self.path} ({reason(error)}); export it again.") from error

    def compile(self, shapes: Shapes | None, *, model: Model | None = None, **more: object) -> CompiledModel:
        """The file (or `model`), compiled for these shapes of its inputs, as they are declared for None."""
        model = model or self.read()
        try:
            if shapes is not None:
                model.reshape(shapes)
            if not self._cache:
                return self.core.compile_model(model, self.device, self._settings | more)
            drop_damaged(self._cache)
            settings = self._settings | more | {"CACHE_DIR": str(self._cache)}
            compiled = self.core.compile_model(model, self.device, settings)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO cannot compile {self.path} for {self.device} ({reason(error)}); use --backend onnxruntime "
                "(build.backend), or export it again."
            ) from error
        keep_hashes(self._cache)
        return compiled

    def load(self, blob: io.BytesIO, **more: object) -> CompiledModel:
        """A compiled model from what it was exported to."""
        return self.core.import_model(blob, self.device, self._settings | more)

    def reserve(self, batch: int) -> None:
        """Compile for one size of batches now, and not when the first one comes."""
        sides = {name: shape for name, (shape, _) in self.inputs.items()}
        self._request({name: (shape[0] or batch, *(side or 1 for side in shape[1:])) for name, shape in sides.items()})

    def _request(self, shapes: Shapes) -> InferRequest:
        """What runs feeds of these shapes: one for each of the first batch sizes, and one for all others."""
        key = tuple(shapes.values()) if self._fixed else ()
        if key not in self._requests and len(self._requests) >= self._most:
            key = ()
        if key not in self._requests:
            self._requests[key] = self.compile(dict(shapes) if key else None).create_infer_request()
        return self._requests[key]

    def __call__(self, feed: Mapping[str, np.ndarray], names: Sequence[str]) -> Arrays:
        """Outputs of a batch."""
        return self.infer(self._request({name: feed[name].shape for name in self.inputs}), feed, names)

    def infer(self, request: InferRequest, feed: Mapping[str, np.ndarray], names: Iterable[str]) -> Arrays:
        """Outputs of a request."""
        try:
            found = request.infer(dict(feed), share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on this input ({reason(error)}).") from error
        return {name: found[name] for name in names}

    def close(self) -> None:
        """Free the compiled models."""
        self._requests.clear()


def open_engine(
    runtime: str, path: Path, *, as_written: bool = False, most: int = 8, **options: Any
) -> OnnxRuntimeEngine | OpenVINOEngine:
    """The engine of a file in "onnxruntime" or "openvino"; `options` are those of its class."""
    if runtime == "openvino":
        return OpenVINOEngine(path, most=most, **options)
    return OnnxRuntimeEngine(path, as_written=as_written, **options)


def flat_argmax(model: Model) -> Model:
    """A graph of OpenVINO in which an argmax over the channels of maps (N, C, H, W) is one over (N, C, H W).

    The labels are the same to the bit. Convolutions leave maps with the channels last, and there OpenVINO's TopK takes
    several times as long as on rows of one channel each; the reshape makes it lay them out so.
    """
    ops = module("openvino.opset13")
    for node in model.get_ordered_ops():
        if node.get_type_name() != "TopK" or node.get_axis() != 1 or node.input_value(0).partial_shape.rank != 4:
            continue
        maps = node.input_value(0)
        node.input(0).replace_source_output(ops.reshape(maps, np.array([0, 0, -1]), True).output(0))
        sides = ops.gather(ops.shape_of(maps), np.array([2, 3]), np.array(0))
        whole = ops.concat([np.array([0, 0]), sides], 0)  # a zero keeps what the side is
        for output in node.outputs():
            targets = output.get_target_inputs()
            found = ops.reshape(output, whole, True).output(0)
            for each in targets:
                each.replace_source_output(found)
    model.validate_nodes_and_infer_types()
    return model


def said(model: Model, path: Path) -> dict[str, str]:
    """Device and precision that a file was built for, by its metadata; the usual ones where it names none."""
    usual, place = {"device": "CPU", "precision": "f32"}, ["framework", RUNTIME]
    if not model.has_rt_info(place):
        return usual
    text = str(model.get_rt_info(place).value)
    try:
        about = usual | dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise EngineError(f"the metadata {RUNTIME} of {path} is {text[:80]!r}; build it again.") from error
    if about.get("backend") != "openvino":
        return usual
    if not isinstance(about["device"], str) or about["precision"] not in ("f32", *CAPABILITY):
        raise EngineError(f"the metadata {RUNTIME} of {path} is {text[:80]!r}; build it again.")
    return about


def check_device(core: Core, device: str, key: str) -> None:
    """A device that OpenVINO sees here."""
    devices = list(core.available_devices)
    if device.partition(":")[0] not in (*devices, *(name.partition(".")[0] for name in devices), *VIRTUAL):
        raise EngineError(
            f"OpenVINO sees no device {device} here ({key}); it has {listed(devices)}, and AUTO takes the best of them."
        )


def check_precision(core: Core, device: str, precision: str) -> None:
    """What a CPU cannot compute in is refused; OpenVINO itself would compute in float32 without a word."""
    if precision == "f32" or not device.startswith("CPU"):
        return
    able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if CAPABILITY[precision] not in able:
        floats = sorted({"FP32", *CAPABILITY.values()} & {*able})
        raise EngineError(
            f"this CPU computes in {listed(floats)} and not in {precision} (build.openvino.precision); leave it at f32."
        )


def cache_folder(cache: Path, data: bytes) -> Path:
    """The place of one file and one version of OpenVINO in a folder of compiled models; made, where it is not there."""
    version, digest = importlib.metadata.version("openvino"), hashlib.sha256(data).hexdigest()
    folder = cache / f"openvino-{version}" / digest[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"the cache {cache} cannot be written ({error.strerror}); name another folder.") from error
    return folder


def drop_damaged(folder: Path) -> None:
    """Throw away compiled models whose bytes are not those that were written; OpenVINO would run them."""
    hashes: dict[str, str] = {}
    if (folder / HASHES).exists():
        try:
            hashes = dict(json.loads((folder / HASHES).read_bytes())["sha256"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            LOG.warning("%s is damaged (%s); the models are compiled again.", folder / HASHES, error)
    for blob in folder.glob("*.blob"):
        if hashes.get(blob.name) != sha256_of(blob):
            LOG.warning("%s is not as it was written; it is compiled again.", blob)
            blob.unlink(missing_ok=True)


def keep_hashes(folder: Path) -> None:
    """Write down what the compiled models are, whole or not at all."""
    hashes = {each.name: sha256_of(each) for each in folder.glob("*.blob")}
    unfinished = folder / f".{HASHES}.{os.getpid()}"
    try:
        unfinished.write_text(json.dumps({"kind": KIND, "schema": SCHEMA, "sha256": hashes}, indent=1) + "\n")
        unfinished.replace(folder / HASHES)
    except OSError as error:
        raise EngineError(f"the cache {folder} cannot be written ({error.strerror}); name another folder.") from error


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def binding(port: Output) -> tuple[tuple[int | None, ...], str]:
    """Shape with None for a free dimension, and numpy dtype name."""
    shape = tuple(None if side.is_dynamic else side.get_length() for side in port.partial_shape)
    return shape, str(port.element_type.to_dtype().name)


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def reason(error: RuntimeError) -> str:
    """The last line of OpenVINO's trace; the lines before name places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300].rstrip(".") if lines else "no reason given"
