"""What quantisation sees of an ONNX graph: layers with weights, what feeds them, where the graph begins and ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vss.core.errors import VssError, need, unknown
from vss.deploy.onnx_file import load

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Layer:
    """A node with constant weights.

    Attributes:
        name: path of the module in the network, read off the name of its weight; of a foreign file the node's name.
        node: name of the ONNX node.
        op: its type.
        source, output: names of the tensors that it reads and writes.
        weight: name of its weight.
    """

    name: str
    node: str
    op: str
    source: str
    output: str
    weight: str


class Net:
    """A ModelProto with its edges. Every node gets a name if it has none; nothing else is changed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes: list[Any] = list(model.graph.node)
        self.constants = {tensor.name for tensor in model.graph.initializer}
        self.producer: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = {}
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

    def _edge(self, start: Iterable[Any], neighbours: Callable[[Any], Iterable[Any]]) -> set[str]:
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


def _layer_name(node: Any) -> str:
    """`model.encoder.0.weight` -> `encoder.0`."""
    weight = node.input[1]
    path = weight.removeprefix("model.").removesuffix(".weight")
    return path if weight.endswith(".weight") and path else node.name


def read_onnx(path: Path | str) -> Any:
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


def _unknown_ops(onnx: Any, model: Any) -> Iterator[tuple[str, str]]:
    functions = {(each.domain, each.name) for each in model.functions}
    versions = {each.domain: each.version for each in model.opset_import}
    for node in model.graph.node:
        domain = "" if node.domain in STANDARD else node.domain
        known = onnx.defs.has(node.op_type, versions.get(domain, versions.get("ai.onnx", 1)), domain)
        if not known and (node.domain, node.op_type) not in functions:
            yield node.name or node.output[0], f"{node.domain + '.' if node.domain else ''}{node.op_type}"


def sort_nodes(model: Any) -> None:
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
    """Refuse a layer name that the graph does not have."""
    known = [layer.name for layer in net.layers]
    for name in names:
        if name not in known:
            raise unknown("layer", name, known)


def groups_of(net: Net, most: int = 16) -> dict[str, list[str]]:
    """Layers by the longest module path that gives at most `most` groups: name of the group -> names of its layers.

    A graph of foreign names, which cannot be grouped by path, is cut into `most` runs of neighbouring layers.
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
