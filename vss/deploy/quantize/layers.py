"""What a change of precision sees of an ONNX graph: layers with weights, what feeds them, where it begins and ends.

float16 is made by onnxruntime's converter, with a list of what stays in float32: normalisation, resize, ends like
softmax.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from vss.core.errors import VssError, need, quiet, unknown
from vss.deploy.backends.ort import tapped
from vss.deploy.onnx_file import load

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
STANDARD = ("", "ai.onnx")
KEEP = (
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "Sqrt", "Pow", "Div", "Reciprocal",
    "Exp", "Log", "Softmax", "LogSoftmax", "Sigmoid", "Resize",
)  # fmt: skip
"""Sums over a map and exponentials leave the 11 bits or the 65504 of float16; resizing adds an error of its own."""
NORMS = frozenset(KEEP[:14])
FLOAT, FLOAT16 = 1, 10  # onnx.TensorProto
LARGEST = 65504.0  # in float16
ELEMENTWISE = ("Add", "Sub", "Mul", "Abs", "Neg", "Min", "Max", "Clip")


@dataclass(frozen=True)
class Layer:
    """A node with constant weights. `name` is the path of the module in the network, read off the name of its weight;
    of a foreign file that of the node. `source` and `output` are the tensors that it reads and writes.
    """

    name: str
    node: str
    op: str
    source: str
    output: str
    weight: str


class Net:
    """A ModelProto with its edges. Every node gets a name if it has none; nothing else is changed."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants = {tensor.name for tensor in model.graph.initializer}
        self.producer: dict[str, NodeProto] = {}
        self.consumers: dict[str, list[NodeProto]] = {}
        taken = {node.name for node in self.nodes}
        for index, node in enumerate(self.nodes):
            if not node.name:
                node.name = _free(f"{node.op_type}_{index}", taken)
            if node.op_type == "Constant":
                self.constants.update(node.output)
            self.producer.update(dict.fromkeys(node.output, node))
            for tensor in dict.fromkeys(node.input):
                self.consumers.setdefault(tensor, []).append(node)
        self.inputs = [value.name for value in model.graph.input if value.name not in self.constants]
        self.outputs = [value.name for value in model.graph.output]

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """In the order of the graph; a weight that serves twice gives names with #2, #3, ..."""
        found, seen = [], dict[str, int]()
        weights = {tensor.name for tensor in self.model.graph.initializer}
        for node in self.nodes:
            if node.op_type in LAYERS and node.domain in STANDARD and node.input[1] in weights:
                name = _layer_name(node)
                seen[name] = seen.get(name, 0) + 1
                name += f"#{seen[name]}" if seen[name] > 1 else ""
                found.append(Layer(name, node.name, node.op_type, node.input[0], node.output[0], node.input[1]))
        return found

    @functools.cached_property
    def first(self) -> set[str]:
        """Names of the layers that no other layer comes before."""
        start = (node for tensor in self.inputs for node in self.consumers.get(tensor, []))
        return self._edge(start, lambda node: (n for out in node.output for n in self.consumers.get(out, [])))

    @functools.cached_property
    def last(self) -> set[str]:
        """Names of the layers whose result reaches an output without another layer in between."""
        start = (self.producer[tensor] for tensor in self.outputs if tensor in self.producer)
        return self._edge(start, lambda node: (self.producer[t] for t in node.input if t in self.producer))

    def _edge(self, start: Iterable[NodeProto], neighbours: Callable[[NodeProto], Iterable[NodeProto]]) -> set[str]:
        """Layers that a walk meets first."""
        by_node = {layer.node: layer.name for layer in self.layers}
        queue, visited, found = list(start), set[str](), set[str]()
        while queue:
            node = queue.pop()
            if node.name in visited:
                continue
            visited.add(node.name)
            if node.name in by_node:
                found.add(by_node[node.name])
            else:
                queue += neighbours(node)
        return found

    @functools.cached_property
    def depth(self) -> dict[str, int]:
        """Node name -> length of the longest path to it from an input."""
        depths: dict[str, int] = {}
        for node in self.nodes:
            before = [depths[self.producer[t].name] for t in node.input if t in self.producer]
            depths[node.name] = 1 + max(before, default=0)
        return depths

    @functools.cached_property
    def outer(self) -> set[str]:
        """Names of the nodes before every layer and of those behind every layer: pre- and post-processing."""
        layer_nodes = {layer.node for layer in self.layers}
        behind, before = set[str](), set[str]()
        for node in self.nodes:
            if any(self.producer[t].name in layer_nodes | behind for t in node.input if t in self.producer):
                behind.add(node.name)
        for node in reversed(self.nodes):
            readers = (reader.name for out in node.output for reader in self.consumers.get(out, []))
            if any(reader in layer_nodes | before for reader in readers):
                before.add(node.name)
        return {node.name for node in self.nodes} - layer_nodes - (behind & before)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _layer_name(node: NodeProto) -> str:
    """`model.encoder.0.weight` -> `encoder.0`."""
    weight = str(node.input[1])
    path = weight.removeprefix("model.").removesuffix(".weight")
    return path if weight.endswith(".weight") and path else str(node.name)


def read_onnx(path: Path | str) -> ModelProto:
    """A ModelProto that can be worked on; a file that is none, and operators that nothing defines, are refused."""
    onnx = need("onnx", "reading ONNX files")
    model = load(path)
    for node, op in _unknown_ops(onnx, model):
        raise VssError(
            f"{path} has the operator {op} (node {node}), which ONNX does not define and the file does not either; "
            "precision can only be changed where every operator is known: export it with standard operators or with "
            "an ONNX function."
        )
    return model


def _unknown_ops(onnx: ModuleType, model: ModelProto) -> Iterator[tuple[str, str]]:
    functions = {(each.domain, each.name) for each in model.functions}
    versions = {each.domain: each.version for each in model.opset_import}
    for node in model.graph.node:
        domain = "" if node.domain in STANDARD else node.domain
        known = onnx.defs.has(node.op_type, versions.get(domain, versions.get("ai.onnx", 1)), domain)
        if not known and (node.domain, node.op_type) not in functions:
            yield node.name or node.output[0], f"{node.domain + '.' if node.domain else ''}{node.op_type}"


def sort_nodes(model: ModelProto) -> None:
    """Put the nodes of a ModelProto into an order in which they can run, stable, in place."""
    made = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting, done = list(model.graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if made.issuperset(node.input):
                done.append(node)
                made.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise VssError(f"the graph cannot be ordered: node {later[0].name!r} reads what nothing gives.")
        waiting = later
    ordered = [type(node).FromString(node.SerializeToString()) for node in done]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def check_names(net: Net, names: Iterable[str]) -> None:
    known = [layer.name for layer in net.layers]
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)


def groups_of(net: Net, most: int = 16) -> dict[str, list[str]]:
    """Layers by the longest module path that gives at most `most` groups: name of the group -> names of its layers.
    Foreign names, which have no paths, are cut into `most` runs of neighbouring layers.
    """
    names = [layer.name for layer in net.layers]
    deepest = max((name.count(".") for name in names), default=0) + 1
    for parts in range(deepest, 0, -1):
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(".".join(name.split(".")[:parts]), []).append(name)
        if len(groups) <= most:
            return groups
    size = -(-len(names) // most)
    runs = [names[start : start + size] for start in range(0, len(names), size)]
    return {f"{run[0]}..{run[-1]}": run for run in runs}


def kept_nodes(net: Net, layers: Iterable[str] = ()) -> set[str]:
    """Names of the nodes that stay in float32: the operators of `KEEP`; arithmetic between or behind normalising ones
    up to the next layer or activation, so that a normalisation in single operators stays whole; what comes before the
    first layer and behind the last ones; and the layers asked for.
    """
    names = set(layers)
    check_names(net, names)
    kept = net.outer | {layer.node for layer in net.layers if layer.name in names}
    chain: set[str] = set()
    for node in net.nodes:
        behind = any(net.producer[name].name in chain for name in node.input if name in net.producer)
        if node.op_type in NORMS or (node.op_type in ELEMENTWISE and behind):
            chain.add(node.name)
    return kept | chain | {node.name for node in net.nodes if node.op_type in KEEP}


def to_fp16(model: ModelProto, keep: Iterable[str]) -> ModelProto:
    """A converted copy whose inputs and outputs have their types still; nodes named in `keep` stay in float32."""
    float16 = need("onnxruntime.transformers.float16", "FP16")
    with quiet(float16.logger.name):
        converted = float16.convert_float_to_float16(
            copy.deepcopy(model), keep_io_types=True, op_block_list=[], node_block_list=sorted(keep)
        )
    return tidy(converted)


def tidy(model: ModelProto) -> ModelProto:
    """Mend what the converter leaves behind, in place: it casts one tensor once per reader, under one name, which is no
    valid graph; and it rounds what passes from one float32 node to the next to float16 and back.
    """
    nodes = {name: node for node in model.graph.node for name in node.output}  # of equal casts, one
    back = {name: node for name, node in nodes.items() if _casts(node, FLOAT)}
    direct = {
        name: nodes[node.input[0]].input[0]
        for name, node in back.items()
        if node.input[0] in nodes and _casts(nodes[node.input[0]], FLOAT16)
    }
    outputs = {value.name for value in model.graph.output}
    renamed = {source: name for name, source in direct.items() if name in outputs}
    whole = list({node.output[0]: node for node in nodes.values() if node.output[0] not in direct}.values())
    for node in whole:
        names = [direct.get(name, name) for name in node.input]
        node.input[:] = [renamed.get(name, name) for name in names]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    kept = [type(node).FromString(node.SerializeToString()) for node in _alive(whole, outputs)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    sort_nodes(model)
    made = {name for node in kept for name in node.output} - outputs
    values = {value.name: value for value in model.graph.value_info if value.name in made}
    values = {name: type(value).FromString(value.SerializeToString()) for name, value in values.items()}
    del model.graph.value_info[:]
    model.graph.value_info.extend(values.values())
    return model


def _casts(node: NodeProto, to: int) -> bool:
    """Whether a node is a cast to that type which the converter has put in."""
    added = node.name.endswith(("_cast_to_fp32_node", "_cast_to_fp16_node")) or node.name.startswith("graph_")
    return bool(node.op_type == "Cast" and added and node.attribute[0].i == to)


def _alive(nodes: Sequence[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Without casts that nothing reads."""
    while True:
        read = outputs | {name for node in nodes for name in node.input}
        alive = [node for node in nodes if node.op_type != "Cast" or read & set(node.output)]
        if len(alive) == len(nodes):
            return alive
        nodes = alive


def overflow(plain: Path, keep: Sequence[str], image: np.ndarray) -> str | None:
    """A sentence where a layer of a float32 file gives on `image` what float16 cannot hold; onnxruntime's CPU, which
    computes float16 files in float32, would not show it.
    """
    model = read_onnx(plain)
    layers = {layer.output: layer.name for layer in Net(model).layers if layer.name not in keep}
    with tapped(model, list(layers), "all") as session:
        found = session.run(list(layers), {"image": image})
    for name, value in zip(layers, found, strict=True):
        if not np.abs(value).max() <= LARGEST:
            return (
                f"layer {layers[name]} gives values of {np.abs(value).max():.3g} and float16 ends at {LARGEST:.0f}: it "
                "would be infinity on a GPU; export fp32, or keep it and what reads it in float32 (--keep, "
                "precision.keep)."
            )
    return None
