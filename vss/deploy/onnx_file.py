"""Reading ONNX files that came from outside: whole, their external data beside them, or one sentence.

`stated` is what a file's metadata says of the images it takes; a `View` is a file as the rules of the lint read it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from vss.core.errors import VssError, need, one_line, shown
from vss.core.files import parse_json, require_file

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    from vss.data.preprocess import Preprocess

BEHIND_LABELS = ("Cast", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Transpose")
"""Operators that may stand between the choice of a label and the output."""
LARGEST = 2 << 30
"""Bytes of a protobuf message; more is external data."""
KEY = "vss.preprocess"
PREFIX = "model."
"""Of the names of parameters in an exported file: they belong to `SegGraph.model`."""
RUNTIME = "vss.runtime"
"""Of a file that was built for another runtime than onnxruntime: JSON, `backend` and its settings."""
ORDER = "RGB"
FIELDS = ("size", "mean", "std", "order")
PLUGINS = ("VssSegArgmax", "VssMaxPool", "VssMaxUnpool")


def load(path: Path | str, *, external: bool = True) -> ModelProto:
    """The ModelProto of a file, with its external data unless `external` is off."""
    path = require_file(path, kind="ONNX", limit=LARGEST)
    onnx = need("onnx", "reading ONNX files")
    decode_error = need("google.protobuf.message", "reading ONNX files").DecodeError
    try:
        model: ModelProto = onnx.load(str(path), load_external_data=False)
        if external:
            _check_external(path, model)
            onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except VssError:
        raise
    except (decode_error, onnx.checker.ValidationError, ValueError, OSError, RuntimeError) as error:
        raise VssError(f"{path} is no whole ONNX file ({one_line(str(error))}); export it again.") from error
    if not model.graph.node:
        raise VssError(f"{path} holds no ONNX graph; expected a file written by an exporter.")
    if not model.opset_import:
        raise VssError(f"{path} names no version of its operators; it is no whole ONNX file: export it again.")
    odd = next((each for each in model.opset_import if not 1 <= each.version < 1 << 16), None)
    if odd is not None:
        raise VssError(f"{path} asks for version {odd.version} of the operators {shown(odd.domain)}; export it again.")
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        if not all(isinstance(name, str) for name in (node.op_type, node.domain, node.name, *node.input, *node.output)):
            raise VssError(f"{path} has a node with a name that is no text; export it again.")
    _check_functions(path, model)
    return model


def metadata(path: Path | str) -> dict[str, str]:
    """What a file says of itself; its external data is left alone."""
    return {each.key: each.value for each in load(path, external=False).metadata_props}


def runtime_of(path: Path | str) -> str:
    """The runtime that an ONNX file was built for, by its own metadata; onnxruntime where it names none."""
    text = metadata(path).get(RUNTIME)
    if text is None:
        return "onnxruntime"
    said = parse_json(text, source=f"the metadata {RUNTIME} of {path}", kind="vss build")
    if not isinstance(said, dict) or not isinstance(said.get("backend"), str):
        raise VssError(f"the metadata {RUNTIME} of {path} is {shown(text)}; build it again.")
    return str(said["backend"])


def set_metadata(model: ModelProto, key: str, value: str | None) -> None:
    """Make a model say one thing more of itself, or for None one thing less."""
    kept = [(each.key, each.value) for each in model.metadata_props if each.key != key]
    del model.metadata_props[:]
    for name, text in [*kept, *([] if value is None else [(key, value)])]:
        model.metadata_props.add(key=name, value=text)


def quantised_as(kind: str, model: ModelProto) -> list[str]:
    """The tensors that a file quantises while it runs, as "INT8" or as "UINT8" (what its zero points are)."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    wanted = getattr(need("onnx", "INT8").TensorProto, kind)
    quantisers = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2]
    return [node.input[0] for node in quantisers if types.get(node.input[2]) == wanted and node.input[0] not in types]


def deciding(graph: GraphProto, output: str) -> str | None:
    """The tensor that labels are chosen by: the first input of the last node that does more than cast and reshape."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in BEHIND_LABELS:
        node = makers.get(node.input[0])
    return str(node.input[0]) if node is not None and node.input else None


def require_one_file(path: Path | str) -> Path:
    """The path, when all of it is in one file: external data is refused, since what is built, hashed and shipped is one
    file."""
    tensor = next((each for each in _tensors(load(path, external=False)) if each.external_data), None)
    if tensor is not None:
        place = shown("".join(entry.value for entry in tensor.external_data if entry.key == "location"))
        raise VssError(
            f"{path} keeps {shown(tensor.name)} in another file, {place}, and an artefact is one file; "
            "write it as one (less than 2 GiB): onnx.save(onnx.load(OLD), NEW)."
        )
    return Path(path)


def _check_external(path: Path, model: ModelProto) -> None:
    """Every piece lies within a regular file beside the ONNX file."""
    for tensor in (tensor for tensor in _tensors(model) if tensor.external_data):
        about = {entry.key: entry.value for entry in tensor.external_data}
        name = about.get("location", "")
        beside = path.parent / name
        if not name or not beside.resolve().is_relative_to(path.parent.resolve()):
            raise VssError(f"{path} keeps a tensor in {name!r}, which does not lie beside it; export it again.")
        if not os.path.exists(beside):
            raise VssError(
                f"{beside}, which {path} refers to, does not exist; expected an ONNX file with all of its data."
            )
        start, length = (int(about.get(key) or 0) for key in ("offset", "length"))
        if min(start, length) < 0 or start + length > require_file(beside, kind="ONNX data").stat().st_size:
            raise VssError(f"{path} keeps a tensor beyond the end of {beside}; copy both files again.")


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes += graph.node
        else:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs


def _check_functions(path: Path, model: ModelProto) -> None:
    """No function calls itself, not by way of others either."""
    calls = {(f.domain, f.name): {(node.domain, node.op_type) for node in f.node} for f in model.functions}
    calls = {name: called & calls.keys() for name, called in calls.items()}
    while calls:
        leaves = {name for name, called in calls.items() if not called}
        if not leaves:
            raise VssError(f"{path} has functions that call themselves ({min(calls)[1]}); export it again.")
        calls = {name: called - leaves for name, called in calls.items() if name not in leaves}


def text_of(images: Preprocess, size: tuple[int, int]) -> str:
    """The value of `KEY` in a file that takes images of `size`, (H, W)."""
    values = {"size": list(size), "mean": list(images.mean), "std": list(images.std), "order": ORDER}
    return json.dumps(values)


def stated(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """{"size", "mean", "std"} of a file's metadata, as `vss.data.preprocess.Preprocess` takes them; None where the file
    says nothing. Damaged values and another channel order than RGB are refused.
    """
    if KEY not in metadata:
        return None
    values = parse_json(metadata[KEY], source=f"the file's metadata {KEY}", kind="vss export")
    numbers = {"size": (2, int), "mean": (3, float), "std": (3, float)}
    if (
        not isinstance(values, dict)
        or set(values) != set(FIELDS)
        or not all(
            isinstance(values[key], list)
            and len(values[key]) == count
            and all(type(each) in (int, kind) and math.isfinite(each) for each in values[key])
            for key, (count, kind) in numbers.items()
        )
    ):
        raise VssError(f"the file's metadata {KEY} is {shown(values)}; expected {', '.join(FIELDS)}: export it again.")
    if values.pop("order") != ORDER:
        raise VssError(
            f"the file takes channels in another order than {ORDER}, which vss does not feed; export it again."
        )
    return values


@dataclass
class View:
    """A model as the rules read it.

    Attributes:
        nodes: every node: graph, branches and loops, bodies of functions that no plugin replaces.
        constants: tensor name -> TensorProto of initializers and Constant nodes.
        producer, consumers: tensor name -> the node that makes it, the nodes that read it.
        types, shapes: tensor name -> element type (onnx.TensorProto), list of int or None per dimension; where known.
        functions: names of the local functions; plugins: names of the plugins that TensorRT will have.
        targets: GPUs that an engine is for, such as "sm86"; fault: what ONNX's own inference refuses, "" for nothing.
    """

    onnx: ModuleType
    model: ModelProto
    plugins: frozenset[str]
    opset: int = 0
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    producer: dict[str, NodeProto] = field(default_factory=dict)
    consumers: dict[str, list[NodeProto]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[int | None]] = field(default_factory=dict)
    functions: frozenset[str] = frozenset()
    targets: tuple[str, ...] = ()
    fault: str = ""

    def of(self, *ops: str) -> Iterator[NodeProto]:
        """The nodes of the standard domain, of these types where some are named."""
        standard = (node for node in self.nodes if node.domain in ("", "ai.onnx"))
        return (node for node in standard if not ops or node.op_type in ops)

    def attribute(self, node: NodeProto, name: str, default: object) -> Any:
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

    def type_name(self, kind: int) -> str:
        return str(self.onnx.TensorProto.DataType.Name(kind))


def label(node: NodeProto) -> str:
    """How a node is named to a person: its name, or its type and first output."""
    return node.name or f"{node.op_type} of {node.output[0] if node.output else '?'}"


def look(model: ModelProto | Path | str, *, plugins: Sequence[str] = PLUGINS) -> View:
    """Read a path or ModelProto into a `View`, with inferred types and shapes."""
    if isinstance(model, str | Path):
        model = load(model)
    onnx = need("onnx", "the lint")
    view = View(onnx, model, frozenset(plugins), functions=frozenset(each.name for each in model.functions))
    view.opset = _version(model.opset_import)
    _infer(view)
    _walk(view, model.graph, view.opset)
    for function in model.functions:
        if function.name not in view.plugins:
            _add_nodes(view, function.node, _version(function.opset_import))
    return view


def _version(opset_import: Any) -> int:
    return max((each.version for each in opset_import if each.domain in ("", "ai.onnx")), default=0)


def _infer(view: View) -> None:
    """Types and shapes as far as shape inference gets; what it cannot know stays unknown, what it refuses is kept."""
    inference = view.onnx.shape_inference
    errors = (inference.InferenceError, view.onnx.checker.ValidationError, ValueError, RuntimeError)
    try:
        inferred = inference.infer_shapes(view.model, check_type=True, strict_mode=True, data_prop=True)
    except errors as error:
        view.fault = one_line(str(error))
        try:
            inferred = inference.infer_shapes(view.model, data_prop=True)
        except errors:  # one bad node: what the file itself declares is still there
            inferred = view.model
    graph = inferred.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        view.types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            view.shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


def _walk(view: View, graph: GraphProto, opset: int) -> None:
    for tensor in graph.initializer:
        view.constants[tensor.name] = tensor
        view.types[tensor.name], view.shapes[tensor.name] = tensor.data_type, list(tensor.dims)
    _add_nodes(view, graph.node, opset)


def _add_nodes(view: View, nodes: Iterable[NodeProto], opset: int) -> None:
    for node in nodes:
        if node.domain in ("", "ai.onnx"):
            _check_ends(view, node, opset)
        view.nodes.append(node)
        for name in node.output:
            view.producer[name] = node
        for name in node.input:
            view.consumers.setdefault(name, []).append(node)
        for attribute in node.attribute:
            if attribute.type == view.onnx.AttributeProto.GRAPH:
                _walk(view, attribute.g, opset)
            if node.op_type == "Constant" and attribute.name == "value":
                view.constants[node.output[0]] = attribute.t
                view.types[node.output[0]] = attribute.t.data_type


def _check_ends(view: View, node: NodeProto, opset: int) -> None:
    """A node has the inputs and outputs that its op cannot do without; ops that ONNX has not are left to the rules."""
    defs = view.onnx.defs
    for version in ((opset, ""), ()):
        with contextlib.suppress(defs.SchemaError):
            schema = defs.get_schema(node.op_type, *version)
            break
    else:
        return
    if len(node.input) < schema.min_input or len(node.output) < schema.min_output:
        raise VssError(
            f"the node {label(node)} has {len(node.input)} inputs and {len(node.output)} outputs; {node.op_type} takes "
            f"{schema.min_input} and gives {schema.min_output} at least: export the file again."
        )
