"""What a build says of an engine that it made, without a GPU: its layers, their types, and whether they are what the
ONNX file asked for.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vss.core.errors import need

LINE = re.compile(
    r"Name: (.*?), LayerType: (\w+), Inputs: \[(.*)\], Constants: \[(.*)\], Outputs: \[(.*)\], TacticName: (.*?), "
    r"StreamId: (\d+),(?: EventId: (\d+),)? Metadata: ?(.*)"
)
TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^]]*)\].*?Datatype: (\w+), Format: (.*?) \}")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
WORDS = {"Int8": ("Int8", "INT8"), "Half": ("Half", "FP16"), "Float": ("Float", "FP32"), "FP8": ("FP8",)}
"""Type -> how engine layers spell it, in the order in which they are looked for."""
TENSOR_TYPES = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8"}
"""Element type of ONNX -> DataType of TensorRT, where the names differ."""
CONVOLUTIONS = ("Conv", "ConvTranspose")
ASKED = {"FLOAT": "Float", "FLOAT16": "Half", "INT8": "Int8"}


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


def check_ends(model: Any, engine: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Check:
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


def _differs(value: Any, made: Mapping[str, Any]) -> str:
    onnx, tensor = need("onnx", "checking engines"), value.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if TENSOR_TYPES.get(kind, kind) != made["dtype"]:
        return f"{value.name} is {made['dtype']} and was {kind}"
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    if tensor.HasField("shape") and dims != list(made["shape"]):
        return f"{value.name} is {list(made['shape'])} and was {dims} (-1 is free)"
    return ""


def convolutions(model: Any, layers: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Convolution of the file -> {"op", "asked", "runs"}, each of Int8, Half and Float; "" where no layer names it."""
    runs: dict[str, str] = {}
    for layer in layers:
        for name in nodes_of(layer) if layer.get("LayerType") not in ("kgen", "shape_call", "signal", "wait") else ():
            runs.setdefault(name, type_of(layer))
    asked = _asked(model)
    found = {}
    for node in model.graph.node:
        if node.op_type in CONVOLUTIONS:
            found[node.name] = {"op": node.op_type, "asked": asked(node), "runs": runs.get(node.name, "")}
    return found


def _asked(model: Any) -> Any:
    """A function of a convolution: the type that the file gives it, by its weight."""
    onnx = need("onnx", "checking engines")
    makers = {name: node for node in model.graph.node for name in node.output}
    held = {each.name: onnx.TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer}

    def asked(node: Any) -> str:
        image, weight = (makers.get(name) for name in node.input[:2])
        both = all(each is not None and each.op_type == "DequantizeLinear" for each in (image, weight))
        if both:
            return "Int8"
        name = node.input[1]
        while name not in held and name in makers and makers[name].input:
            maker = makers[name]
            if maker.op_type == "DequantizeLinear":  # its type is that of its scale
                name = maker.input[1]
                continue
            name = maker.input[0]
        return ASKED.get(held.get(name, ""), "")

    return asked


def check_types(found: Mapping[str, Mapping[str, str]], float_ops: Iterable[str]) -> Check:
    """Every convolution runs in the type that the file gives it; quantised ones of `float_ops` cannot and are named. A
    list of layers that names none of them shows nothing, and fails."""
    unnamed = [name for name, each in found.items() if not each["runs"]]
    known = {name: each for name, each in found.items() if each["asked"] and each["runs"]}
    left = [name for name, each in known.items() if each["op"] in float_ops and each["asked"] == "Int8"]
    wrong = [n for n, each in known.items() if each["asked"] != each["runs"] and n not in left]
    shares = Counter(each["runs"] for each in known.values())
    parts = [f"{count} of {len(found)} convolutions run in {kind}" for kind, count in shares.most_common()]
    parts += [f"{len(unnamed)} are in no layer by name"] if unnamed else []
    parts += [f"{len(left)} ConvTranspose are quantised in the file and run in floating point"] if left else []
    if wrong:
        some = ", ".join(f"{n} ({found[n]['asked']} asked, {found[n]['runs']} runs)" for n in wrong[:4])
        parts.append(f"not as asked: {some}{' and others' if len(wrong) > 4 else ''}")
    shown = len(unnamed) < max(len(found), 1)
    return Check("types of convolutions", shown and not wrong, ", ".join(parts) or "the file has no convolution")


def summary(layers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Count of engine layers by type, `total` too; layers that read none of `WORDS` are "other"."""
    kinds = [type_of(layer) or "other" for layer in layers]
    return {"total": len(kinds), **dict(sorted(Counter(kinds).items()))}
