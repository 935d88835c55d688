"""What TensorRT refuses or runs badly in an ONNX file, found without TensorRT.

A rule is data: name, severity, reason, fix, and a function that finds its places in a `View`. Sources: the operator
table and importers of the public ONNX parser of TensorRT 10.1, the type notes in the headers of 10.16 and 11.1, and
the documentation of 11. A newer parser may take more; `supports_model_v2` of an installed TensorRT has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vss.core.errors import need
from vss.deploy.onnx_file import load

PLUGINS = ("VssSegArgmax", "VssMaxPool", "VssMaxUnpool")
Severity = Literal["error", "warning"]
Found = Iterable[tuple[str, str]]
"""Places of one rule: (name of the node or tensor, what is there)."""


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    severity: Severity
    reason: str
    fix: str
    find: Callable[[View], Found]


@dataclass
class View:
    """A model as the rules read it.

    Attributes:
        nodes: every node: graph, branches and loops, bodies of functions that no plugin replaces.
        constants: tensor name -> TensorProto of initializers and Constant nodes.
        producer, consumers: tensor name -> the node that makes it, the nodes that read it.
        types, shapes: tensor name -> element type (onnx.TensorProto), list of int or None per dimension; where known.
        functions: names of the local functions; plugins: names of the plugins that TensorRT will have.
    """

    onnx: Any
    model: Any
    plugins: frozenset[str]
    opset: int = 0
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, Any] = field(default_factory=dict)
    consumers: dict[str, list[Any]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[int | None]] = field(default_factory=dict)
    functions: frozenset[str] = frozenset()

    def of(self, *ops: str) -> Iterator[Any]:
        """The nodes of these types in the standard domain."""
        return (node for node in self.nodes if node.op_type in ops and node.domain in ("", "ai.onnx"))

    def attribute(self, node: Any, name: str, default: Any) -> Any:
        """Value of an attribute; text as str."""
        for each in node.attribute:
            if each.name == name:
                value = self.onnx.helper.get_attribute_value(each)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant tensor, or None."""
        found = self.constants.get(name)
        return None if found is None else self.onnx.numpy_helper.to_array(found)

    def type_of(self, name: str) -> int:
        """Element type, 0 where unknown."""
        return self.types.get(name, 0)


def label(node: Any) -> str:
    """How a node is named to a person: its name, or its type and first output."""
    return node.name or f"{node.op_type} of {node.output[0] if node.output else '?'}"


def look(model: Any, *, plugins: Sequence[str] = PLUGINS) -> View:
    """Read a path or ModelProto into a `View`, with inferred types and shapes."""
    onnx = need("onnx", "the lint")
    if isinstance(model, str | Path):
        model = load(model)
    view = View(onnx, model, frozenset(plugins), functions=frozenset(each.name for each in model.functions))
    view.opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    _infer(view)
    _walk(view, model.graph)
    for function in model.functions:
        if function.name not in view.plugins:
            _add_nodes(view, function.node)
    return view


def _infer(view: View) -> None:
    """Types and shapes as far as shape inference gets; what it cannot know stays unknown."""
    inference = view.onnx.shape_inference
    try:
        inferred = inference.infer_shapes(view.model, data_prop=True)
    except (inference.InferenceError, view.onnx.checker.ValidationError, ValueError, RuntimeError):
        # one bad node: what the file itself declares is still there
        inferred = view.model
    graph = inferred.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        view.types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            view.shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


def _walk(view: View, graph: Any) -> None:
    for tensor in graph.initializer:
        view.constants[tensor.name] = tensor
        view.types[tensor.name], view.shapes[tensor.name] = tensor.data_type, list(tensor.dims)
    _add_nodes(view, graph.node)


def _add_nodes(view: View, nodes: Iterable[Any]) -> None:
    for node in nodes:
        view.nodes.append(node)
        for name in node.output:
            view.producer[name] = node
        for name in node.input:
            view.consumers.setdefault(name, []).append(node)
        for attribute in node.attribute:
            if attribute.type == view.onnx.AttributeProto.GRAPH:
                _walk(view, attribute.g)
            if node.op_type == "Constant" and attribute.name == "value":
                view.constants[node.output[0]] = attribute.t
                view.types[node.output[0]] = attribute.t.data_type
