"""OpenVINO: runs an exported ONNX file as it is, on CPUs and on Intel's GPUs and NPUs.

An artefact is the ONNX file with one more entry in its metadata, which names the runtime, the device and the precision.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vss.core.config import BuildConfig, OpenVINOConfig
from vss.core.environment import cpu_flags, package_version
from vss.core.errors import VssError, need
from vss.core.files import atomic, parse_json, sha256_file
from vss.core.yaml12 import parse
from vss.deploy import onnx_file
from vss.deploy.backends.base import INT8_OF_CPUS, Binding, BuildSpec, Session, refuse_nan, sentences
from vss.deploy.backends.onnx_runner import (
    OpenVINOEngine,
    binding,
    check_device,
    check_precision,
    openvino_core,
)
from vss.deploy.onnx_file import RUNTIME, quantised_as

if TYPE_CHECKING:
    from onnx import GraphProto
    from openvino import CompiledModel, Input, Node

DEVICE = "build.openvino.device"
LOG = logging.getLogger(__name__)
PURPOSE = "the runtime openvino"
ORIGINAL = "originalLayersNames"
QDQ = ("QuantizeLinear", "DequantizeLinear")
COMPUTES = {"i8": "int8", "f32": "fp32", "f16": "fp16"}
"""End of a kernel's name -> what it computes in."""
COUNTING = {"PERF_COUNT": True}
WARM, COUNTED = 2, 4
"""First runs of a loaded model that are left out of a profile, and runs that are counted."""
INT8_BY = {
    "AMX, made for it": {"amx_int8"},
    "VNNI, made for it": {"avx512_vnni", "avx_vnni"},
    "AVX-512 without VNNI, so expect less": {"avx512bw"},
    "AVX2 without VNNI, 1.5 to 2.4 times float32 where it was measured": {"avx2"},
    "dot products of ARM, made for it": {"asimddp", "i8mm"},
}
"""What a processor has for INT8, the best first, with its flags in /proc/cpuinfo."""
MISREAD = (
    "quantises {} as int8, as TensorRT wants it, and OpenVINO computes such files wrong (see the guide on precision); "
    "write it for OpenVINO: vss export --precision int8 --backend openvino"
)
NO_INT8 = "no instructions for it, expect no gain"
Shapes = dict[str, tuple[int, ...]]


class OpenVINOBackend:
    """OpenVINO: the fastest of the runtimes here on most CPUs, INT8 above all."""

    name, title, packages = "openvino", "OpenVINO", ("openvino",)
    devices, precisions, beside_int8, runs_here = ("cpu",), ("fp32", "int8"), "fp32", True
    steps: ClassVar = {"fp32": {"Conv": 16}, "int8": {"Conv": 32}}
    steps_why = "latency tables of a U-Net found those to pay (AVX2); a table of this network counts in their place"
    int8 = INT8_OF_CPUS
    """Of int8 activations in front of a Concat 2026.4 keeps a few levels: it wants uint8 there, and makes the quantiser
    anew with an interval that it had noted in other units. Without VNNI its kernels add two products in 16 bits. Where
    sides are free it scales a convolution for each of its readers, all of which then read the product."""

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
        need("openvino", PURPOSE)
        core = openvino_core()
        with sentences():
            check_device(core, config.openvino.device, DEVICE)
            check_precision(core, config.openvino.device, config.openvino.precision)

    def check_timed(self, config: BuildConfig) -> None:
        """Refuse what its layers are not timed with, so that no table says it of another device or type."""
        asked, usual = config.openvino, OpenVINOConfig()
        if (asked.device, asked.precision) != (usual.device, usual.precision):
            raise VssError(
                f"latency targets, latency tables and vss explain time openvino on the {usual.device} in "
                f"{usual.precision}, and build.openvino asks for {asked.precision} on {asked.device}; leave "
                "build.openvino.device and build.openvino.precision out."
            )

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
        if signed := quantised_as("INT8", model):
            raise VssError(f"{onnx} {MISREAD.format(signed[0])}.")
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
        need("openvino", PURPOSE)
        if threads is not None and threads < 1:
            raise VssError(f"threads is {threads}; expected 1 or more.")
        place = path or artefact
        self._model = onnx_file.load(onnx_file.require_one_file(artefact))  # OpenVINO's own refusal says nothing
        if signed := quantised_as("INT8", self._model):
            LOG.warning("%s %s; its answers here are not what it says.", place, MISREAD.format(signed[0]))
        about = {each.key: each.value for each in self._model.metadata_props}
        stated = said(about, place)
        device, precision = device or stated.device, precision or stated.precision
        with sentences():
            self._engine = OpenVINOEngine(
                artefact, threads=threads, device=device, precision=precision, cache=cache, name=place, key=DEVICE
            )
            self.inputs = {name: Binding(*each) for name, each in self._engine.inputs.items()}
            model = self._engine.read()
            names = [each.name for each in self._model.graph.output]
            self.outputs = {name: Binding(*binding(model.output(name))) for name in names}
        self._profiled: tuple[Shapes, CompiledModel] | None = None
        self._about = {
            "backend": "openvino",
            "version": package_version("openvino"),
            "device": device,
            "precision": precision,
            "threads": threads,
            "artefact_sha256": sha256_file(artefact),
            "artefact_bytes": artefact.stat().st_size,
            "metadata": about,
        }

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with sentences():
            return self._engine(feed, list(self.outputs))

    def probe(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The logits, from the same file compiled once more with them as an output; slow."""
        refuse_nan(self._model, self._engine.path)
        source = onnx_file.deciding(self._model.graph, "labels") if "labels" in self.outputs else None
        if source is None:
            return {}
        with sentences():
            model = self._engine.read()
            model.add_outputs(source)
            compiled = self._engine.compile({name: feed[name].shape for name in self.inputs}, model=model)
            return self._engine.infer(compiled.create_infer_request(), feed, [source])

    def profile(self, feed: Mapping[str, np.ndarray], runs: int) -> dict[str, list[float]]:
        """Milliseconds of every layer of the compiled model in each run, by OpenVINO's performance counters.

        A counter is the mean over all runs of a compiled model, in whole microseconds: a run is the difference of two
        sums, which are known well after few runs alone. So the model is loaded anew for every `COUNTED` of them.
        """
        times, blob = defaultdict[str, list[float]](list), self._counted(feed).export_model()
        for done in range(0, runs, COUNTED):
            model = self._engine.load(blob, **COUNTING)
            request, sums = model.create_infer_request(), defaultdict[str, list[float]](list)
            for run in range(1, WARM + min(COUNTED, runs - done) + 1):
                with sentences():
                    self._engine.infer(request, feed, ())
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
            before = [name for each in op.inputs() for name in _source(each, made)]
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

    def _counted(self, feed: Mapping[str, np.ndarray]) -> CompiledModel:
        """The model compiled for the shapes of a feed with performance counters, which cost a little."""
        shapes = {name: feed[name].shape for name in self.inputs}
        if self._profiled is None or self._profiled[0] != shapes:
            with sentences():
                self._profiled = shapes, self._engine.compile(shapes, **COUNTING)
        return self._profiled[1]

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def close(self) -> None:
        self._engine.close()
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


def _differences(sums: Sequence[float], unsure: float) -> list[float]:
    """Of neighbours; all the same where they differ by no more than is `unsure`."""
    found = [after - before for before, after in pairwise(sums)]
    if max(found) - min(found) <= unsure:
        return [max(0.0, (sums[-1] - sums[0]) / len(found))] * len(found)
    return [max(0.0, each) for each in found]


def _made(graph: GraphProto) -> dict[str, str]:
    """Node -> the tensor that it makes, of QuantizeLinear and DequantizeLinear the one that it is made of."""
    nodes = {node.output[0]: node for node in graph.node}
    made = {}
    for node in graph.node:
        tensor = node.output[0]
        while tensor in nodes and nodes[tensor].op_type in QDQ:
            tensor = nodes[tensor].input[0]
        made[node.name] = tensor
    return made


def _nodes(op: Node, made: Mapping[str, str]) -> list[str]:
    """The ONNX nodes that a layer of the compiled model does the work of; one that a pass has split off or merged in is
    known by its own name alone."""
    found = [name for name in _facts(op).get(ORIGINAL, "").split(",") if name in made]
    return found or [name for name in [op.get_friendly_name().removesuffix("_original")] if name in made]


def _source(port: Input, made: Mapping[str, str]) -> list[str]:
    """The last ONNX node before an input, past layers that only lay it out anew; none, or one."""
    op = port.get_source_output().get_node()
    found = _nodes(op, made)[-1:]
    return found or (_source(op.input(0), made) if _facts(op)["layerType"] in ("Reorder", "Reshape") else [])


def _facts(op: Node) -> dict[str, str]:
    """What the compiled model says of one of its layers."""
    info = op.get_rt_info()
    return {key: str(info[key].value) for key in info}
