"""OpenVINO: runs an exported ONNX file as it is, on CPUs and on Intel's GPUs and NPUs.

An artefact is the ONNX file with one more entry in its metadata, which names the runtime, the device and the precision.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vss.core.config import BuildConfig, OpenVINOConfig
from vss.core.environment import cpu_flags, package_version
from vss.core.errors import VssError, listed, need, one_line
from vss.core.files import atomic, parse_json, read_json, sha256_file, target_of, write_json
from vss.core.yaml12 import parse
from vss.deploy import onnx_file
from vss.deploy.backends.base import Binding, BuildSpec, Int8, Session, refuse_nan
from vss.deploy.onnx_file import RUNTIME

LOG = logging.getLogger(__name__)
PURPOSE = "the runtime openvino"
KIND, SCHEMA, HASHES = "vss.compiled", 1, "hashes.json"
CAPABILITY = {"bf16": "BF16", "f16": "FP16"}
VIRTUAL = ("AUTO", "HETERO", "MULTI")
MOST = 8
"""Batch sizes of which a session keeps the compiled model."""
ON_CPU = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
"""One image after another; threads stay on the cores that the process has."""
ORIGINAL = "originalLayersNames"
QDQ = ("QuantizeLinear", "DequantizeLinear")
COMPUTES = {"i8": "int8", "f32": "fp32", "f16": "fp16"}
"""End of a kernel's name -> what it computes in."""
COUNTING = {"PERF_COUNT": True}
WARM, COUNTED = 2, 4
"""First runs of a loaded model that are left out of a profile, and runs that are counted."""
INT8_BY = {
    "AMX, many times as fast as float32": {"amx_int8"},
    "VNNI, two to three times as fast as float32": {"avx512_vnni", "avx_vnni"},
    "AVX-512 without VNNI, somewhat faster than float32": {"avx512bw"},
    "AVX2 without VNNI, somewhat faster than float32": {"avx2"},
    "dot products of ARM, faster than float32": {"asimddp", "i8mm"},
}
"""What a processor has for INT8, the best first, with its flags in /proc/cpuinfo."""
NO_INT8 = "no instructions for it, expect no gain"
Shapes = Mapping[str, tuple[int, ...]]


class OpenVINOBackend:
    """OpenVINO: the fastest of the runtimes here on most CPUs, INT8 above all."""

    name, title, packages = "openvino", "OpenVINO", ("openvino",)
    devices, precisions, beside_int8, runs_here = ("cpu",), ("fp32", "int8"), "fp32", True
    steps: ClassVar = {kind: {"Conv": 8} for kind in ("fp32", "int8")}
    steps_why = "its CPU kernels compute channels in blocks of eight"
    int8 = Int8(unsigned=True, weight_bits=7, once=True)
    """Of int8 activations in front of a Concat 2026.4 keeps a few levels: it wants uint8 there, and makes the quantiser
    anew with an interval that it had noted in other units. Without VNNI its kernels add two products in 16 bits."""

    def unavailable(self) -> str | None:
        try:
            need("openvino", PURPOSE)
        except VssError as error:
            return str(error)
        return None

    def spec(self, config: BuildConfig) -> BuildSpec:
        """What a recipe asks of it."""
        return BuildSpec(openvino=config.openvino)

    def check_here(self, config: BuildConfig) -> None:
        """Refuse a device or a precision that this machine has not."""
        core = need("openvino", PURPOSE).Core()
        check_device(core, config.openvino.device)
        check_precision(core, config.openvino.device, config.openvino.precision)

    def open_options(self, config: BuildConfig) -> dict[str, Any]:
        """What a run opens its artefacts with, threads aside."""
        return {"cache": config.openvino.cache}

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        """Copy the ONNX file, with device and precision in its metadata, once OpenVINO has compiled it."""
        if spec.optimise is not None or spec.plan is not None:
            raise VssError("openvino takes a device and a precision alone; optimise is for onnxruntime, plans are for "
                           "tensorrt.")  # fmt: skip
        asked = spec.openvino or OpenVINOConfig()
        model = onnx_file.load(onnx_file.require_one_file(onnx))
        wanted = {"backend": self.name, "device": asked.device, "precision": asked.precision}
        onnx_file.set_metadata(model, RUNTIME, json.dumps(wanted))
        with atomic(out) as temporary:
            temporary.write_bytes(model.SerializeToString())
            with self.open(temporary, cache=asked.cache, path=onnx):
                pass
        return Path(out)

    def open(self, artefact: Any, *, threads: int | None = None, **options: Any) -> Session:
        """Open an ONNX file. Options: those of `OpenVINOSession`."""
        return OpenVINOSession(Path(artefact), threads=threads, **options)


class OpenVINOSession(Session):
    """One ONNX file in OpenVINO.

    A file with a free batch alone is compiled for each batch size that comes, which is faster than one model for all.

    Args:
        artefact: the ONNX file.
        threads: None leaves the choice to OpenVINO.
        device, precision: as in `OpenVINOConfig`; None is what the file says, else CPU and float32.
        cache: folder of compiled models; one that is damaged, or of another version, is made again.
        path: the name that sentences give to the file.
    """

    def __init__(
        self,
        artefact: Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        precision: str | None = None,
        cache: Path | None = None,
        path: Path | None = None,
    ) -> None:
        self._path, ov = path or artefact, need("openvino", PURPOSE)
        if threads is not None and threads < 1:
            raise VssError(f"threads is {threads}; expected 1 or more.")
        self._model = onnx_file.load(onnx_file.require_one_file(artefact))  # OpenVINO's own refusal says nothing
        about = {each.key: each.value for each in self._model.metadata_props}
        stated, self._core = said(about, self._path), ov.Core()
        self._device, self._precision = device or stated.device, precision or stated.precision
        check_device(self._core, self._device)
        check_precision(self._core, self._device, self._precision)
        self._settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self._precision}
        if self._device.startswith("CPU"):
            self._settings |= ON_CPU | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self._sha256 = sha256_file(artefact)
        self._cache = cache and Path(cache) / f"openvino-{package_version('openvino')}" / self._sha256[:16]
        self._requests: dict[tuple[Any, ...], Any] = {}
        self._profiled: tuple[Shapes, Any] | None = None
        model = self._read()
        self.inputs = {port.any_name: _binding(port) for port in model.inputs}
        names = [each.name for each in self._model.graph.output]
        self.outputs = {name: _binding(model.output(name)) for name in names}
        if any(side is None for binding in self.inputs.values() for side in binding.shape[1:]):
            self._requests[()] = self._compiled(None).create_infer_request()
        else:  # for one image, so that what cannot be compiled is refused now
            usual = {name: np.zeros([side or 1 for side in b.shape], b.dtype) for name, b in self.inputs.items()}
            self._request(usual)
        self._about = {
            "backend": "openvino",
            "version": package_version("openvino"),
            "device": self._device,
            "precision": self._precision,
            "threads": threads,
            "artefact_sha256": self._sha256,
            "artefact_bytes": artefact.stat().st_size,
            "metadata": about,
        }

    def _read(self) -> Any:
        """The file as OpenVINO's own graph; raises `VssError` naming the operators that it has not."""
        try:
            return self._core.read_model(self._model.SerializeToString())
        except RuntimeError as error:
            _, found, ops = str(error).partition("No conversion rule found for operations:")
            if found:
                names = sorted(name.strip() for name in ops.strip().splitlines()[0].split(","))
                raise VssError(
                    f"OpenVINO cannot do {listed(names)} of {self._path}; use --backend onnxruntime (build.backend)."
                ) from error
            raise VssError(f"OpenVINO cannot read {self._path} ({_reason(error)}); export it again.") from error

    def _compiled(self, shapes: Shapes | None, *, model: Any = None, **more: Any) -> Any:
        """The file (or `model`), compiled for these shapes of its inputs, as they are declared for None."""
        model = model or self._read()
        try:
            if shapes is not None:
                model.reshape(shapes)
            settings, folder = self._settings | more, self._cache
            if folder is None:
                compiled = self._core.compile_model(model, self._device, settings)
            else:
                _drop_damaged(folder)
                compiled = self._core.compile_model(model, self._device, settings | {"CACHE_DIR": str(folder)})
                hashes = {each.name: sha256_file(each) for each in folder.glob("*.blob")}
                write_json(folder / HASHES, {"kind": KIND, "schema": SCHEMA, "sha256": hashes})
        except RuntimeError as error:
            raise VssError(
                f"OpenVINO cannot compile {self._path} for {self._device} ({_reason(error)}); use --backend "
                "onnxruntime (build.backend), or export it again."
            ) from error
        return compiled

    def _request(self, feed: Mapping[str, np.ndarray]) -> Any:
        """What runs a feed: one for all where sides are free, else one for each batch size."""
        key = () if () in self._requests else tuple(feed[name].shape for name in self.inputs)
        if key not in self._requests:
            if len(self._requests) == MOST:
                self._requests.pop(next(iter(self._requests)))
            compiled = self._compiled({name: feed[name].shape for name in self.inputs})
            self._requests[key] = compiled.create_infer_request()
        return self._requests[key]

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._infer(self._request(feed), feed, self.outputs)

    def _infer(self, request: Any, feed: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
        try:
            found = request.infer(dict(feed), share_inputs=True)
        except RuntimeError as error:
            raise VssError(f"OpenVINO failed on this input ({_reason(error)}).") from error
        return {name: found[name] for name in names}

    def probe(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The logits, from the same file compiled once more with them as an output; slow."""
        refuse_nan(self._model, self._path)
        source = onnx_file.deciding(self._model.graph, "labels") if "labels" in self.outputs else None
        if source is None:
            return {}
        model = self._read()
        model.add_outputs(source)
        compiled = self._compiled({name: feed[name].shape for name in self.inputs}, model=model)
        return self._infer(compiled.create_infer_request(), feed, [source])

    def profile(self, feed: Mapping[str, np.ndarray], runs: int) -> dict[str, list[float]]:
        """Milliseconds of every layer of the compiled model in each run, by OpenVINO's performance counters.

        A counter is the mean over all runs of a compiled model, in whole microseconds: a run is the difference of two
        sums, which are known well after few runs alone. So the model is loaded anew for every `COUNTED` of them.
        """
        times, blob = defaultdict[str, list[float]](list), self._counted(feed).export_model()
        for done in range(0, runs, COUNTED):
            model = self._core.import_model(blob, self._device, self._settings | COUNTING)
            request, sums = model.create_infer_request(), defaultdict[str, list[float]](list)
            for run in range(1, WARM + min(COUNTED, runs - done) + 1):
                self._infer(request, feed, ())
                for each in request.profiling_info if run >= WARM else ():
                    mean = each.real_time.total_seconds() * 1e6
                    sums[each.node_name].append(run * mean + (run - 1) / 2 if mean else 0.0)
            for name, known in sums.items():
                if known[-1]:  # else it is no work, as a constant
                    times[name] += [spent / 1e3 for spent in _differences(known, 2.0 * (WARM + COUNTED))]
        return dict(times)

    def layers(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """{"Layers": of the compiled model}, in the words of TensorRT's inspector: Name, LayerType, Precision, Kernel,
        Metadata (the ONNX nodes in it), and the tensors of the file that an inserted layer stands between. A layer that
        quantises alone is a QuantizeLinear, and what a Q/DQ node makes is known by the tensor that it is made of.
        """
        made, casts = _made(self._model.graph), {n.name for n in self._model.graph.node if n.op_type in QDQ}
        rows = []
        for op in self._counted(feed).get_runtime_model().get_ordered_ops():
            about, known = _facts(op), _nodes(op, made)
            sides = [each.get_source_output().get_node() for each in op.inputs()]
            before = [name for each in sides for name in _nodes(each, made)[-1:]]
            sides = [each.get_node() for output in op.outputs() for each in output.get_target_inputs()]
            after = [*known[-1:], *(name for each in sides for name in _nodes(each, made)[-1:])]
            rows.append({
                "Name": op.get_friendly_name(),
                "LayerType": QDQ[0] if known and casts.issuperset(known) else about["layerType"],
                "Precision": COMPUTES.get(about["primitiveType"].rpartition("_")[2].lower(), about["runtimePrecision"]),
                "Kernel": about["primitiveType"],
                "Metadata": "".join(f"[ONNX Layer: {name}]" for name in known),
                "Inputs": [{"Name": made[name]} for name in before],
                "Outputs": [{"Name": made[name]} for name in after],
            })  # fmt: skip
        return {"Layers": rows}

    def _counted(self, feed: Mapping[str, np.ndarray]) -> Any:
        """The model compiled for the shapes of a feed with performance counters, which cost a little."""
        shapes = {name: feed[name].shape for name in self.inputs}
        if self._profiled is None or self._profiled[0] != shapes:
            self._profiled = shapes, self._compiled(shapes, **COUNTING)
        return self._profiled[1]

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def close(self) -> None:
        self._requests.clear()
        self._profiled = None


def int8_by(flags: frozenset[str] | None = None) -> str:
    """What a processor multiplies INT8 with, and what to expect of it; by default this one.

    `flags` are those of /proc/cpuinfo. Without an instruction for dot products (VNNI, AMX) OpenVINO multiplies pairs in
    16 bits, which saturates where weights use all eight bits.
    """
    known = cpu_flags() if flags is None else flags
    for name, needed in INT8_BY.items():
        if needed & known:
            return name
    return NO_INT8


def said(about: Mapping[str, str], path: Path) -> OpenVINOConfig:
    """Device and precision that an artefact was built for; the usual ones for a file of no runtime or another one."""
    text = about.get(RUNTIME)
    stated = parse_json(text, source=f"the metadata {RUNTIME} of {path}", kind="vss build") if text else {}
    if not isinstance(stated, dict) or stated.pop("backend", "openvino") != "openvino":
        return OpenVINOConfig()
    found: OpenVINOConfig = parse(OpenVINOConfig, stated, source=f"the metadata {RUNTIME} of {path}")
    return found


def check_device(core: Any, device: str) -> None:
    """A device that OpenVINO sees here."""
    devices = list(core.available_devices)
    if device.partition(":")[0] not in (*devices, *(name.partition(".")[0] for name in devices), *VIRTUAL):
        raise VssError(
            f"OpenVINO sees no device {device} here (build.openvino.device); it has {listed(devices)}, and AUTO takes "
            "the best of them."
        )


def check_precision(core: Any, device: str, precision: str) -> None:
    """What a CPU cannot compute in is refused; OpenVINO itself would compute in float32 without a word."""
    if precision == "f32" or not device.startswith("CPU"):
        return
    able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if CAPABILITY[precision] not in able:
        floats = sorted({"FP32", *CAPABILITY.values()} & {*able})
        raise VssError(
            f"this CPU computes in {listed(floats)} and not in {precision} (build.openvino.precision); leave it at f32."
        )


def _drop_damaged(folder: Path) -> None:
    """Throw away compiled models whose bytes are not those that were written; OpenVINO would run them."""
    hashes: dict[str, str] = {}
    if (folder / HASHES).exists():
        try:
            hashes = read_json(folder / HASHES, kind=KIND, schema=SCHEMA).get("sha256", {})
        except VssError as error:
            LOG.warning("%s The models are compiled again.", error)
    for blob in folder.glob("*.blob"):
        if hashes.get(blob.name) != sha256_file(blob):
            LOG.warning("%s is not as it was written; it is compiled again.", blob)
            blob.unlink(missing_ok=True)
    target_of(folder / HASHES)


def _differences(sums: Sequence[float], unsure: float) -> list[float]:
    """Of neighbours; all the same where they differ by no more than is `unsure`."""
    found = [after - before for before, after in pairwise(sums)]
    if max(found) - min(found) <= unsure:
        return [(sums[-1] - sums[0]) / len(found)] * len(found)
    return [max(0.0, each) for each in found]


def _made(graph: Any) -> dict[str, str]:
    """Node -> the tensor that it makes, of QuantizeLinear and DequantizeLinear the one that it is made of."""
    nodes = {node.output[0]: node for node in graph.node}
    made = {}
    for node in graph.node:
        tensor = node.output[0]
        while tensor in nodes and nodes[tensor].op_type in QDQ:
            tensor = nodes[tensor].input[0]
        made[node.name] = tensor
    return made


def _nodes(op: Any, made: Mapping[str, str]) -> list[str]:
    """The ONNX nodes that a layer of the compiled model does the work of; one that a pass has split off or merged in is
    known by its own name alone."""
    found = [name for name in _facts(op).get(ORIGINAL, "").split(",") if name in made]
    return found or [name for name in [op.get_friendly_name().removesuffix("_original")] if name in made]


def _facts(op: Any) -> dict[str, str]:
    """What the compiled model says of one of its layers."""
    info = op.get_rt_info()
    return {key: str(info[key].value) for key in info}


def _binding(port: Any) -> Binding:
    shape = tuple(None if side.is_dynamic else side.get_length() for side in port.partial_shape)
    return Binding(shape, port.element_type.to_dtype().name)


def _reason(error: RuntimeError) -> str:
    """The last line of OpenVINO's trace; the lines before name places in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1]).rstrip(".") if lines else "no reason given"
