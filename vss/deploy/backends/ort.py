"""ONNX Runtime: opens an exported ONNX file on the CPU, or on CUDA when asked and there."""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vss.core.config import BuildConfig
from vss.core.errors import VssError, need
from vss.core.files import atomic, sha256_file
from vss.deploy.backends.base import INT8_OF_CPUS, Binding, BuildSpec, Session, refuse_nan
from vss.deploy.onnx_file import RUNTIME, deciding, load, quantised_as, require_one_file, set_metadata

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession, NodeArg

LOG = logging.getLogger(__name__)
SLOW = (
    "quantises {} as int8, as TensorRT wants it: onnxruntime computes it right, but convolutions in float32; write it "
    "anew: vss export --precision int8 --backend onnxruntime"
)


class OnnxRuntimeBackend:
    """ONNX Runtime: the default, works wherever there is a CPU."""

    name, title, packages = "onnxruntime", "ONNX Runtime", ("onnxruntime", "onnxruntime-gpu")
    devices, precisions, beside_int8, runs_here = ("cpu",), ("fp32", "int8"), "fp32", True
    steps: ClassVar = {kind: {"Conv": 8} for kind in ("fp32", "fp16", "int8")}
    steps_why = "off the eights a convolution leaves the blocked layout of CPU kernels or is reordered into it again"

    int8 = INT8_OF_CPUS
    """Behind a ReLU it makes one INT8 kernel of a convolution only in front of a quantiser to uint8 that does what the
    ReLU does, and without VNNI its kernels add two products in 16 bits."""

    def unavailable(self) -> str | None:
        try:
            need("onnxruntime", "running ONNX files")
        except VssError as error:
            return str(error)
        return None

    def spec(self, config: BuildConfig) -> BuildSpec:
        """The ONNX file as it is."""
        return BuildSpec()

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        """Copy the ONNX (checked by opening it), or write the graph as onnxruntime optimises it."""
        levels = {"basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED"}
        if spec.optimise is not None and spec.optimise not in levels:
            raise VssError(f"optimise is {spec.optimise!r}; expected basic, extended or nothing.")
        if spec.plan is not None or spec.openvino is not None:
            raise VssError("a build plan is for tensorrt, a device for openvino; onnxruntime takes optimise alone.")
        with atomic(out) as temporary:
            if spec.optimise is None:
                with self.open(onnx):
                    shutil.copyfile(onnx, temporary)
                model = load(onnx)
                if signed := quantised_as("INT8", model):
                    LOG.warning("%s %s", onnx, SLOW.format(signed[0]))
                if any(each.key == RUNTIME for each in model.metadata_props):  # built for another runtime before
                    set_metadata(model, RUNTIME, None)
                    temporary.write_bytes(model.SerializeToString())
            else:
                with OnnxRuntimeSession(Path(onnx), optimisation=spec.optimise, write=temporary):
                    pass  # opening it writes the optimised graph
        return Path(out)

    def open(self, artefact: Any, *, threads: int | None = None, **options: Any) -> Session:
        """Open an ONNX file. Options: `provider` ("cpu" or "cuda"), `optimisation` (see `OnnxRuntimeSession`)."""
        return OnnxRuntimeSession(Path(artefact), threads=threads, **options)


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OPTIMISATION = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


class OnnxRuntimeSession(Session):
    """One ONNX file in ONNX Runtime.

    Args:
        path: the ONNX file.
        threads: threads within an operator; None is one per physical core.
        provider: "cpu" or "cuda"; a provider that is not there is an error, never a silent fallback.
        optimisation: "disabled", "basic", "extended" or "all"; None is "all", and "disabled" for a file with float16
            Q/DQ, whose accuracy onnxruntime's passes spoil: such a file is opened in no other way.
        write: also write the optimised graph here.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        provider: str = "cpu",
        optimisation: str | None = None,
        write: Path | None = None,
    ) -> None:
        ort = need("onnxruntime", "running ONNX files")
        _check_options(ort, threads, provider, optimisation or "all")
        if not path.is_file():
            raise VssError(f"{path} does not exist; expected an ONNX file.")
        self._path, self._errors = path, _ort_errors()

        def start(level: str) -> InferenceSession:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads or 0
            options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMISATION[level])
            if write is not None:
                options.optimized_model_filepath = str(write)
            try:
                return ort.InferenceSession(str(path), options, providers=[PROVIDERS[provider]])
            except self._errors as error:
                raise VssError(
                    f"{path} cannot be opened as ONNX ({_first_line(error)}): "
                    "the file is damaged or foreign; export it again."
                ) from error

        self._session: InferenceSession = start(optimisation or "all")
        require_one_file(path)  # whose hash is that of all it computes with
        if _runs_as_written(self._session) and optimisation != "disabled":
            if optimisation is not None:
                raise VssError(
                    f"{path} holds float16 Q/DQ and must run as written, not with optimisation {optimisation!r}: leave "
                    "that option off."
                )
            optimisation = "disabled"
            self._session = start(optimisation)
        if self._session.get_providers()[0] != PROVIDERS[provider]:
            raise VssError(f"onnxruntime did not start {provider} (see its log); check the driver and CUDA version.")
        self.inputs = {each.name: _ort_binding(each) for each in self._session.get_inputs()}
        self.outputs = {each.name: _ort_binding(each) for each in self._session.get_outputs()}
        self._about = {
            "backend": "onnxruntime",
            "version": ort.__version__,
            "device": provider,
            "threads": threads,
            "optimisation": optimisation or "all",
            "artefact_sha256": sha256_file(path),
            "artefact_bytes": path.stat().st_size,
            "metadata": dict(self._session.get_modelmeta().custom_metadata_map),
        }

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return dict(zip(self.outputs, self._session.run(None, dict(feed)), strict=True))
        except self._errors as error:
            raise VssError(f"onnxruntime failed on this input ({_first_line(error)}).") from error

    def probe(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The logits, from the same file opened beside; slow."""
        if "labels" not in self.outputs:
            return {}
        model = need("onnx", "looking into ONNX files").load(str(self._path))
        refuse_nan(model, self._path)
        source = deciding(model.graph, "labels")
        if source is None:
            return {}
        with tapped(model, [source], self._about["optimisation"]) as session:
            return {source: session.run([source], dict(feed))[0]}

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def close(self) -> None:
        self._session = None


def _runs_as_written(session: InferenceSession) -> bool:
    """Whether a file says of itself that it has Q/DQ in float16."""
    about = session.get_modelmeta().custom_metadata_map
    return (about.get("vss.precision"), about.get("vss.elsewhere")) == ("int8", "fp16")


def _check_options(ort: ModuleType, threads: int | None, provider: str, optimisation: str) -> None:
    if threads is not None and threads < 1:
        raise VssError(f"threads is {threads}; expected 1 or more.")
    if optimisation not in OPTIMISATION:
        raise VssError(f"optimisation is {optimisation!r}; expected one of {', '.join(OPTIMISATION)}.")
    if provider not in PROVIDERS:
        raise VssError(f"provider is {provider!r}; expected one of {', '.join(PROVIDERS)}.")
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise VssError(
            f"this onnxruntime has no {PROVIDERS[provider]} (it has {', '.join(ort.get_available_providers())}); run: "
            "pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )


def _ort_errors() -> tuple[type[Exception], ...]:
    """Every error class of the onnxruntime binding; they share no base but Exception."""
    binding = need("onnxruntime", "running ONNX files").capi.onnxruntime_pybind11_state
    found = (value for value in vars(binding).values() if isinstance(value, type))
    return tuple(value for value in found if issubclass(value, Exception))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300].rstrip(".")


def _ort_binding(value: NodeArg) -> Binding:
    names = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    dtype = names.get(value.type) or value.type.removeprefix("tensor(").removesuffix(")")
    return Binding(tuple(side if isinstance(side, int) else None for side in value.shape), dtype)


@contextlib.contextmanager
def tapped(model: ModelProto, tensors: Sequence[str], optimisation: str) -> Iterator[InferenceSession]:
    """An onnxruntime session, on the CPU, of a ModelProto that also gives these tensors."""
    ort = need("onnxruntime", "running ONNX files")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMISATION[optimisation])
    with tempfile.TemporaryDirectory(prefix="vss-tapped-") as folder:
        path = extended(model, tensors, Path(folder) / "tapped.onnx")
        yield ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def extended(model: ModelProto, tensors: Sequence[str], path: Path) -> Path:
    """Write a model that also gives these tensors."""
    onnx = need("onnx", "looking into ONNX files")
    wider = copy.deepcopy(model)
    own = {value.name for value in wider.graph.output}
    wider.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in own)
    onnx.save(wider, str(path))
    return path
