"""What is timed: the nodes of an engine, named after the exported graph, with the channels that go in and out.

A runtime fuses and renames. A unit is one timed piece under a name that stays the same at every width: a layer by its
module (`encoder.0.1.0`), anything else by its operator and the tensor it makes (`Concat:cat_1`,
`ReorderOutput:relu_7`).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vss.core.errors import VssError, need
from vss.deploy.backends.trt_layers import type_of
from vss.deploy.bench import pinned as on_cores
from vss.deploy.onnx_file import PREFIX

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


class Profiled(Protocol):
    """A session that times its own layers."""

    def run(self, feed: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]: ...

    def profile(self, feed: Mapping[str, np.ndarray], runs: int) -> dict[str, list[float]]:
        """Layer -> milliseconds of every run."""

    def layers(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """{"Layers": [...]} in the words of TensorRT's engine inspector."""


LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Identity")
RENAMED = re.compile(r"(_token_\d+)?(_nchwc)?$")
"""What onnxruntime puts behind the name of a node that it replaces."""
QUANTISED = ("_QuantizeLinear_Output", "_DequantizeLinear_Output")
"""What its quantiser puts behind the name of a tensor."""
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
FUSED = re.compile(r"\s+\+\s+|\s+\|\|\s+|\.\.\.|[\[\](){},\s]+")
COPIES = "Reformatting CopyNode"
PRECISIONS = {"Int8": "int8", "int8": "int8", "uint8": "int8", "Half": "fp16", "Float": "fp32", "float": "fp32"}
"""Types as TensorRT's inspector and onnxruntime's profile say them."""
WARM_RUNS = 2
MOST_PROFILED = 200


@dataclass(frozen=True)
class Shape:
    """Sizes of one unit for one image batch.

    Attributes:
        cin, cout: channels read and written; an input that is a weight does not count.
        positions: output elements per output channel.
        macs: multiply-accumulates; 0 for what is no layer.
        bytes: read and written, weights included.
    """

    cin: int
    cout: int
    positions: int
    macs: int
    bytes: int


@dataclass
class Graph:
    """The nodes of an exported file by name and by what they make."""

    nodes: dict[str, NodeProto] = field(default_factory=dict)
    makers: dict[str, NodeProto] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: ModelProto) -> Graph:
        """Of an onnx ModelProto as `vss.deploy.export` writes it."""
        nodes = {node.name: node for node in model.graph.node}
        makers = {name: node for node in model.graph.node for name in node.output if name}
        return cls(nodes, makers, {each.name for each in model.graph.initializer})

    def unit(self, node: NodeProto) -> str:
        """Name of the unit that a node of this graph is."""
        weight = node.input[1] if node.op_type in LAYERS and len(node.input) > 1 else ""
        if weight.startswith(PREFIX):
            return weight.removeprefix(PREFIX).rpartition(".")[0]
        return f"{node.op_type}:{node.output[0]}"

    def resolve(self, name: str, op: str, tensors: Sequence[str] = ()) -> str:
        """The unit of a timed node `name` of an optimised graph. onnxruntime names blocked nodes after the tensor that
        they make, and numbers those that it replaces; those of the `tensors` at a node that the exported graph has tell
        inserted nodes apart.
        """
        name = RENAMED.sub("", name, count=1)
        if name in self.nodes:
            return self.unit(self.nodes[name])
        if name in self.makers:
            return self.unit(self._before_activations(name) if "Conv" in op else self.makers[name])
        plain = (tensor.removesuffix(QUANTISED[0]).removesuffix(QUANTISED[1]) for tensor in tensors)
        known = [tensor for tensor in plain if tensor in self.makers]
        return f"{op}:{known[0] if known else 'other'}"

    def engine_layer(self, layer: Mapping[str, Any], shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, float]:
        """The units that a layer of an engine, as TensorRT's inspector describes it, does the work of -> shares of its
        time.

        A layer with weights takes what is fused with it; several of them in one engine layer share by their MACs, for
        which `shapes` is asked.
        """
        text = layer.get("Metadata") or ""
        named = ONNX_LAYER.findall(text) or FUSED.split(layer["Name"])
        nodes = [] if layer["Name"].startswith(COPIES) else [self.nodes[name] for name in named if name in self.nodes]
        if not nodes:
            sides = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
            known = [side["Name"] for side in sides if side["Name"] in self.makers]
            return {f"{layer.get('LayerType') or 'Layer'}:{known[0] if known else 'other'}": 1.0}
        units = list(dict.fromkeys(map(self.unit, nodes)))
        heavy = [unit for unit in units if ":" not in unit] or units[:1]
        if len(heavy) == 1:
            return {heavy[0]: 1.0}
        sizes = shapes()
        macs = {unit: sizes[unit].macs for unit in heavy}
        return {unit: count / sum(macs.values()) for unit, count in macs.items()}

    def _before_activations(self, tensor: str) -> NodeProto:
        """The layer whose fused activation made a tensor."""
        node = self.makers[tensor]
        while node.op_type in ACTIVATIONS and node.input[0] in self.makers:
            node = self.makers[node.input[0]]
        return node


def unit_shapes(model: ModelProto, batch: int, item: int = 4) -> dict[str, Shape]:
    """Every unit and every tensor (`tensor:NAME`) of an exported graph with static sizes and `batch` images of `item`
    bytes an element; initializers may be declared as inputs without values (`SlicedVariants.graph(empty=True)`).
    """
    onnx = need("onnx", "latency tables")
    model = copy.deepcopy(model)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = batch
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {each.name: tuple(each.dims) for each in inferred.initializer}
    for each in (*inferred.input, *inferred.value_info, *inferred.output):
        shapes[each.name] = tuple(dim.dim_value for dim in each.type.tensor_type.shape.dim)
    graph = Graph.of(model)
    weights = graph.weights | {each.name for each in inferred.input if each.name.startswith(PREFIX)}
    found = {graph.unit(node): _shape(node, shapes, weights, item) for node in model.graph.node}
    for name in graph.makers:
        count = _channels(shapes.get(name, ()))
        found[f"tensor:{name}"] = Shape(count, count, _size(shapes.get(name, ())) // max(1, count), 0, 0)
    return found


def _shape(node: NodeProto, shapes: dict[str, tuple[int, ...]], weights: set[str], item: int) -> Shape:
    read = [shapes.get(name, ()) for name in node.input if name and name not in weights]
    held = [shapes[name] for name in node.input if name in weights]
    made = shapes.get(node.output[0], ())
    cout, macs = _channels(made), 0
    if node.op_type in LAYERS and held:
        rows = read[0] if node.op_type == "ConvTranspose" else made
        macs = _size(held[0]) * (_size(rows) // max(1, _channels(rows)))
    moved = sum(map(_size, read)) + sum(map(_size, held)) + _size(made)
    return Shape(sum(map(_channels, read)), cout, _size(made) // max(1, cout), macs, item * moved)


def _channels(shape: tuple[int, ...]) -> int:
    return int(shape[1]) if len(shape) > 1 else 1


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) if shape else 0


def lookup_shape(unit: str, shapes: dict[str, Shape]) -> Shape | None:
    """Sizes of a unit, those of its tensor when the runtime has put it in, None when neither is known."""
    return shapes.get(unit) or shapes.get(f"tensor:{unit.partition(':')[2]}")


Part = tuple[str, float, tuple[str, str]]
"""Of a unit: its name, milliseconds, and what it ran as, see `Reading.kernels`."""


@dataclass(frozen=True)
class Reading:
    """Milliseconds of one network: `units` name -> minimum over all passes, `total` of a whole pass, likewise.

    `kernels`: name -> what the longest part of a unit computes in ("int8", "fp32") and the runtime's name of that;
    of runtimes that say so, and not kept in tables.
    """

    units: dict[str, float]
    total: float
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, parts: Iterable[Part], total: float, *, alone: bool) -> Reading:
        """Units by the clock, and the whole, by its thread's CPU time where that is `alone`: units that took longer
        together waited for their core, and each bears its share of that."""
        units, kernels = defaultdict[str, float](float), dict[str, tuple[str, str]]()
        for unit, ms, kernel in sorted(parts, key=lambda part: part[1]):
            units[unit] += ms
            kernels[unit] = kernel
        waited = max(1.0, sum(units.values()) / total) if alone else 1.0
        return cls({name: ms / waited for name, ms in units.items()}, total, kernels)

    def least(self, other: Reading) -> Reading:
        """The minimum of two readings of the same network, unit by unit."""
        both = self.units | other.units
        units = {name: min(self.units.get(name, ms), other.units.get(name, ms)) for name, ms in both.items()}
        return Reading(units, min(self.total, other.total), self.kernels)

    def rounded(self) -> Reading:
        """To a nanosecond, as a table holds it."""
        return Reading({name: round(ms, 6) for name, ms in self.units.items()}, round(self.total, 6))

    def to_dict(self) -> dict[str, Any]:
        return {"total": self.total, "units": self.units}


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep all threads of this process on the first `threads` usable cores; None where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    cores = sorted(os.sched_getaffinity(0))[:threads]
    with on_cores(cores):
        yield cores


def usable_threads(asked: int | None) -> int:
    """The thread count of a measurement: as asked, else one per usable core."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked is not None and not 1 <= asked <= usable:
        raise VssError(f"threads is {asked}; this process may use 1 to {usable} cores.")
    return asked or usable


def read_onnxruntime(
    path: Path, feed: Mapping[str, np.ndarray], *, threads: int, graph: Graph, seconds: float = 0.4, least: int = 8
) -> Reading:
    """Profile one ONNX file in onnxruntime on the CPU, for so long and at least so many runs; `graph` names units."""
    ort, onnx = need("onnxruntime", "latency tables"), need("onnx", "latency tables")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, threads
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            total = least_ms(lambda: session.run(None, dict(feed)), seconds, least, alone=threads == 1)
            events = json.loads(Path(session.end_profiling()).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise VssError(f"the profile of {path} cannot be written or read ({error}); free some space.") from error
        optimised = onnx.load(f"{folder}/optimised.onnx").graph
    tensors = {node.name: [*node.input, *node.output] for node in optimised.node}
    times: dict[str, list[float]] = defaultdict(list)
    kernels: dict[str, tuple[str, str]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"] / 1e3)
            kinds = [kind for tensor in event["args"].get("input_type_shape", ()) for kind in tensor]
            kernels[name] = PRECISIONS.get(kinds[0], kinds[0]) if kinds else "", event["args"]["op_name"]
    found = [
        (graph.resolve(name, kernels[name][1], tensors.get(name, ())), min(each[WARM_RUNS:] or each), kernels[name])
        for name, each in times.items()
    ]
    return Reading.of(found, total, alone=threads == 1)


def read_engine(
    session: Profiled,
    feed: Mapping[str, np.ndarray],
    *,
    graph: Graph,
    shapes: Callable[[], Mapping[str, Shape]],
    seconds: float = 0.4,
    least: int = 8,
    alone: bool = False,
) -> Reading:
    """Profile an engine by its runtime's own profiler (TensorRT's is built with detailed verbosity); the whole is timed
    without it, with the host's copies, on a CPU by its thread's time where it is `alone`. `graph` names its units, and
    `shapes` is asked where one engine layer does the work of several.
    """
    total = least_ms(lambda: session.run(feed), seconds, least, alone=alone)
    runs = max(least, min(MOST_PROFILED, int(seconds * 1e3 / total))) + WARM_RUNS
    layers = {each["Name"]: each for each in session.layers(feed)["Layers"] if isinstance(each, dict)}
    found = list[Part]()
    for name, times in session.profile(feed, runs).items():
        layer = layers.get(name, {"Name": name})
        kind = layer.get("Precision") or PRECISIONS.get(type_of(layer), "")
        kernel = kind, layer.get("Kernel") or layer.get("TacticName") or ""
        for unit, share in graph.engine_layer(layer, shapes).items():
            found.append((unit, share * min(times[WARM_RUNS:] or times), kernel))
    return Reading.of(found, total, alone=alone)


def least_ms(call: Callable[[], object], seconds: float, least: int, *, alone: bool) -> float:
    """Minimum milliseconds of a call, after a warm-up; CPU time of this thread when it does all the work `alone`."""
    clock = time.thread_time_ns if alone else time.perf_counter_ns
    for _ in range(WARM_RUNS):
        call()
    times: list[int] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = clock()
        call()
        times.append(clock() - start)
    return min(times) / 1e6
