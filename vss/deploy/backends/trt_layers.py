"""What a build says of an engine that it made, without a GPU: its layers, their types, and whether they are what the
ONNX file asked for.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vss.core.errors import need
from vss.deploy.onnx_file import View, look

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

LINE = re.compile(
    r"Name: (.*?), LayerType: (\w+), Inputs: \[(.*)\], Constants: \[(.*)\], Outputs: \[(.*)\], TacticName: (.*?), "
    r"StreamId: (\d+),(?: EventId: (\d+),)? Metadata: ?(.*)"
)
TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^]]*)\].*?Datatype: (\w+), Format: (.*?) \}")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
WORDS = {
    "Int8": ("Int8", "INT8"),
    "Half": ("Half", "FP16"),
    "Float": ("Float", "FP32"),
    "BFloat16": ("BFloat16", "BF16"),
    "FP8": ("FP8",),
}
"""Type -> how engine layers spell it, in the order in which they are looked for."""
TENSOR_TYPES = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8"}
"""Element type of ONNX -> DataType of TensorRT, where the names differ."""
CONVOLUTIONS = ("Conv", "ConvTranspose")
ASKED = {"FLOAT": "Float", "FLOAT16": "Half", "BFLOAT16": "BFloat16"}
MOVES = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat", "MaxPool", "Resize")


def parse_layers(text: str) -> list[dict[str, Any]]:
    """The layers in the log of a builder of TensorRT for RTX, in the keys of the engine inspector.

    They end at an empty line, behind which inputs, outputs and the engine are described. A line of another form is kept
    as the layer's name, so that what it did counts as not found.
    """
    layers: list[dict[str, Any]] = []
    for line in itertools.takewhile(str.strip, text.splitlines()[1:]):
        match = LINE.fullmatch(line.strip())
        if match is None:
            layers.append({"Name": line.strip(), "LayerType": "unknown"})
            continue
        name, kind, inputs, constants, outputs, tactic, stream, event, metadata = match.groups()
        sides = {"Inputs": inputs, "Constants": constants, "Outputs": outputs}
        tensors = {side: [_tensor(*found) for found in TENSOR.findall(part)] for side, part in sides.items()}
        layers.append(
            {"Name": name, "LayerType": kind, **tensors, "TacticName": tactic, "StreamId": int(stream)}
            | ({"EventId": int(event)} if event else {})  # of "signal" and "wait", between streams
            | {"Metadata": metadata}
        )
    return layers


def _tensor(name: str, dims: str, kind: str, layout: str) -> dict[str, Any]:
    sides = [int(side) for side in dims.split(",") if side.strip()]
    return {"Name": name, "Dimensions": sides, "Format/Datatype": f"{kind} {layout}"}


def type_of(layer: Mapping[str, Any]) -> str:
    """Int8, Half, Float or FP8: the type of what a layer reads first; "" where the list does not say."""
    tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
    text = str(tensors[0].get("Format/Datatype", "")) if tensors else ""
    words = set(re.split(r"\W+", text))
    return next((kind for kind, names in WORDS.items() if words & set(names)), "")


def nodes_of(layer: Mapping[str, Any]) -> list[str]:
    """Names of the ONNX nodes whose work a layer does."""
    return ONNX_LAYER.findall(str(layer.get("Metadata") or ""))


@dataclass(frozen=True)
class Check:
    """One thing that an engine must agree with its ONNX file in."""

    what: str
    passed: bool
    sentence: str


def check_ends(model: ModelProto, engine: Mapping[str, Mapping[str, Mapping[str, object]]]) -> Check:
    """Names, types and shapes of inputs and outputs, {"inputs", "outputs"} of the parsed network, are the file's."""
    constants = {each.name for each in model.graph.initializer}
    wrong: list[str] = []
    for side in ("inputs", "outputs"):
        stated = {each.name: each for each in getattr(model.graph, side[:-1]) if each.name not in constants}
        if stated.keys() != engine[side].keys():
            wrong.append(f"{side} are {sorted(engine[side])} and were {sorted(stated)}")
            continue
        wrong += [text for name, value in stated.items() if (text := _differs(value, engine[side][name]))]
    sentence = "; ".join(wrong) or "inputs and outputs are those of the file in name, type and shape"
    return Check("inputs and outputs", not wrong, sentence)


def _differs(value: ValueInfoProto, made: Mapping[str, Any]) -> str:
    onnx, tensor = need("onnx", "checking engines"), value.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if TENSOR_TYPES.get(kind, kind) != made["dtype"]:
        return f"{value.name} is {made['dtype']} and was {kind}"
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    if tensor.HasField("shape") and dims != list(made["shape"]):
        return f"{value.name} is {list(made['shape'])} and was {dims} (-1 is free)"
    return ""


def convolutions(model: ModelProto, layers: Iterable[Mapping[str, object]]) -> dict[str, dict[str, str]]:
    """Convolution of the file -> {"op", "asked", "runs"}, types of `WORDS`.

    "asked" is "" where nothing certain is asked: in branches, loops and functions, where another op stands between
    DequantizeLinear and the convolution, and of names that occur twice or hold control characters. "runs" is "" where
    no layer names it. A node without a name is called as TensorRT calls it, after what it makes.
    """
    view = look(model)
    outer = {node.output[0] for node in model.graph.node if node.output}
    nodes = [(node.name or f"node_of_{node.output[0]}", node) for node in view.of(*CONVOLUTIONS)]
    often = Counter(name for name, _ in nodes)
    works = [
        (str(layer.get("Metadata") or ""), type_of(layer))
        for layer in layers
        if layer.get("LayerType") not in ("kgen", "shape_call", "signal", "wait")
    ]
    found = {}
    for name, node in nodes:
        certain = often[name] == 1 and node.output[0] in outer and name.isprintable()
        runs = [kind for text, kind in works if f"[ONNX Layer: {name}]" in text]
        key = name if often[name] == 1 else f"{name} ({node.output[0]})"
        asked = asked_of(view, node) if certain else ""
        found[key] = {"op": node.op_type, "asked": asked, "runs": runs[0] if runs and often[name] == 1 else ""}
    return found


def asked_of(view: View, node: NodeProto) -> str:
    """The type that a file gives a convolution: Int8 where input and weight come from DequantizeLinear, else that of
    the weight as it is read; "" where quantisation is not that plain."""
    makers = [view.producer.get(name) for name in node.input[:2]]
    if all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers):
        return "Int8"
    if all(_quantised(view, name) for name in node.input[:2]):
        return ""
    kind = view.type_of(node.input[1])
    return ASKED.get(view.onnx.TensorProto.DataType.Name(kind), "")


def _quantised(view: View, name: str) -> bool:
    """Whether a tensor comes from DequantizeLinear by ops that move values and compute nothing."""
    maker = view.producer.get(name)
    while maker is not None and maker.op_type in MOVES and maker.input:
        maker = view.producer.get(maker.input[0])
    return maker is not None and maker.op_type == "DequantizeLinear"


def check_types(found: Mapping[str, Mapping[str, str]], float_ops: Iterable[str]) -> Check:
    """Every convolution runs in the type that the file gives it; quantised ones of `float_ops` cannot and are named. A
    list of layers that names none of them shows nothing, and fails."""
    asked = {name: each for name, each in found.items() if each["asked"]}
    known = {name: each for name, each in asked.items() if each["runs"]}
    left = [name for name, each in known.items() if each["op"] in float_ops and each["asked"] == "Int8"]
    wrong = [n for n, each in known.items() if each["asked"] != each["runs"] and n not in left]
    shares = Counter(each["runs"] for each in known.values())
    parts = [f"{count} of {len(found)} convolutions run in {kind}" for kind, count in shares.most_common()]
    parts += [f"{len(asked) - len(known)} are in no layer by name"] if len(asked) > len(known) else []
    parts += [f"{len(found) - len(asked)} are not judged"] if len(found) > len(asked) else []
    parts += [f"{len(left)} ConvTranspose are quantised in the file and run in floating point"] if left else []
    if wrong:
        some = ", ".join(f"{n} ({found[n]['asked']} asked, {found[n]['runs']} runs)" for n in wrong[:4])
        parts.append(f"not as asked: {some}{' and others' if len(wrong) > 4 else ''}")
    shown = bool(known) or not asked
    nothing = "the file has no convolution, and no other layer is judged"
    return Check("types of convolutions", shown and not wrong, ", ".join(parts) or nothing)


def summary(layers: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """Count of engine layers by type, `total` too; layers that read none of `WORDS` are "other"."""
    kinds = [type_of(layer) or "other" for layer in layers]
    return {"total": len(kinds), **dict(sorted(Counter(kinds).items()))}
