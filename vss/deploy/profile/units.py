"""What is timed: the nodes of an engine, named after the exported graph, with the channels that go in and out.

A runtime fuses and renames. A unit is one timed piece under a name that stays the same at every width: a layer by its
module (`encoder.0.1.0`), anything else by its operator and the tensor it makes (`Concat:cat_1`,
`ReorderOutput:relu_7`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vss.core.errors import need
from vss.deploy.profile.variants import PREFIX

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Identity")
SUFFIXES = ("_nchwc",)
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
FUSED = re.compile(r"\s+\+\s+|\s+\|\|\s+|\.\.\.|[\[\](){},\s]+")
COPIES = "Reformatting CopyNode"


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

    nodes: dict[str, Any] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: Any) -> Graph:
        """Of an onnx ModelProto as `vss.deploy.export` writes it."""
        nodes = {node.name: node for node in model.graph.node}
        makers = {name: node for node in model.graph.node for name in node.output if name}
        return cls(nodes, makers, {each.name for each in model.graph.initializer})

    def unit(self, node: Any) -> str:
        """Name of the unit that a node of this graph is."""
        weight = node.input[1] if node.op_type in LAYERS and len(node.input) > 1 else ""
        if weight.startswith(PREFIX):
            return weight.removeprefix(PREFIX).rpartition(".")[0]
        return f"{node.op_type}:{node.output[0]}"

    def resolve(self, name: str, op: str, tensors: Sequence[str] = ()) -> str:
        """The unit of a timed node of an optimised graph.

        Args:
            name: node name there; onnxruntime names blocked nodes after the tensor that they make.
            op: its operator there.
            tensors: names that it reads and writes there; those that the exported graph has tell inserted nodes apart.
        """
        for suffix in SUFFIXES:
            name = name.removesuffix(suffix)
        if name in self.nodes:
            return self.unit(self.nodes[name])
        if name in self.makers:
            return self.unit(self._before_activations(name) if "Conv" in op else self.makers[name])
        known = [tensor for tensor in tensors if tensor in self.makers]
        return f"{op}:{known[0] if known else 'other'}"

    def engine_layer(self, layer: Mapping[str, Any], shapes: Callable[[], Mapping[str, Shape]]) -> dict[str, float]:
        """The units that a layer of a TensorRT engine does the work of -> their shares of its time.

        A layer with weights takes what is fused with it; several of them in one engine layer share by their MACs.

        Args:
            layer: as the engine inspector describes it, or its name alone.
            shapes: sizes of the units.
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

    def _before_activations(self, tensor: str) -> Any:
        """The layer whose fused activation made a tensor."""
        node = self.makers[tensor]
        while node.op_type in ACTIVATIONS and node.input[0] in self.makers:
            node = self.makers[node.input[0]]
        return node


def unit_shapes(model: Any, batch: int, item: int = 4) -> dict[str, Shape]:
    """Every unit and every tensor (`tensor:NAME`) of an exported graph with static sizes and the given batch.

    Args:
        model: ModelProto; initializers may be declared as inputs without values (`SlicedVariants.graph(empty=True)`).
        batch: images.
        item: bytes of an element.
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


def _shape(node: Any, shapes: dict[str, tuple[int, ...]], weights: set[str], item: int) -> Shape:
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


def anchor(unit: str, shapes: dict[str, Shape]) -> Shape | None:
    """Sizes of a unit, those of its tensor when the runtime has put it in, None when neither is known."""
    return shapes.get(unit) or shapes.get(f"tensor:{unit.partition(':')[2]}")
