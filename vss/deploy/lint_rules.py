"""The table of TensorRT's rules for ordinary graphs; those for quantised ones are in `vss.deploy.lint`.

A rule is data: name, severity, reason, fix, and a function that finds its places in a `View`. Sources: the operator
table and importers of the public ONNX parser of TensorRT 10.1, the type notes in the headers of 10.16 and 11.1, and
the documentation of 11. A newer parser may take more; `supports_model_v2` of an installed TensorRT has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vss.deploy.onnx_file import View, label

Severity = Literal["error", "warning"]
Found = Iterable[tuple[str, str]]
"""Places of one rule: (name of the node or tensor, what is there)."""

# Rows "N" of the parser's operator table that a segmentation or defect network could hold.
UNSUPPORTED = (
    *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BlackmanWindow"),
    *("Col2Im", "CenterCropPad", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det", "HammingWindow"),
    *("DynamicQuantizeLinear", "HannWindow", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MelWeightMatrix"),
    *("Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement"),
    *("QLinearConv", "QLinearMatMul", "RegexFullMatch", "STFT", "SequenceAt", "SequenceConstruct", "SequenceEmpty"),
    *("SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss"),
    *("SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique"),
)
TYPES = {"FLOAT": 1, "UINT8": 2, "FLOAT16": 10}  # onnx.TensorProto
FROM_OR_TO_UINT8 = (TYPES["FLOAT"], TYPES["FLOAT16"])
FOREIGN_TYPES = {4: "uint16", 5: "int16", 8: "string", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128"}
COORDINATES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
MAX_RANK, MAX_TOP_K = 8, 3840
OLDEST_OPSET, SURE_OPSET, NEWEST_OPSET = 9, 20, 25


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    severity: Severity
    reason: str
    fix: str
    find: Callable[[View], Found]


def _custom(view: View) -> Iterator[Any]:
    return (node for node in view.nodes if node.domain not in ("", "ai.onnx"))


def _unknown_op(view: View) -> Found:
    for node in _custom(view):
        if node.op_type not in view.plugins and node.op_type not in view.functions:
            yield label(node), f"op {node.domain}::{node.op_type}"


def _name_clash(view: View) -> Found:
    standard = {schema.name for schema in view.onnx.defs.get_all_schemas()}
    for node in _custom(view):
        if node.op_type in standard and node.domain != "ai.onnx.ml":
            yield label(node), f"op {node.domain}::{node.op_type}"


def _no_schema(view: View) -> Found:
    standard = {schema.name for schema in view.onnx.defs.get_all_schemas() if not schema.domain}
    for node in view.nodes:
        if node.domain in ("", "ai.onnx") and node.op_type not in standard and node.op_type not in view.functions:
            yield label(node), f"op {node.op_type}"


def _unsupported(view: View) -> Found:
    return ((label(node), f"op {node.op_type}") for node in view.of(*UNSUPPORTED))


def _unpool(view: View) -> Found:
    return ((label(node), "op MaxUnpool") for node in view.of("MaxUnpool"))


def _pool_indices(view: View) -> Found:
    return ((label(n), f"indices {n.output[1]!r}") for n in view.of("MaxPool") if len(n.output) > 1 and n.output[1])


def _pool_dilations(view: View) -> Found:
    for node in view.of("MaxPool", "AveragePool", "LpPool"):
        dilations = view.attribute(node, "dilations", [1])
        if any(each != 1 for each in dilations):
            yield label(node), f"dilations {list(dilations)}"


def _resize(name: str, default: object, allowed: tuple[object, ...]) -> Rule:
    def find(view: View) -> Found:
        for node in view.of("Resize"):
            value = view.attribute(node, name, default)
            if value not in allowed:
                yield label(node), f"{name} {value}"

    takes = ", ".join(map(str, allowed))
    return Rule(f"resize_{name}", "error", f"the parser takes {name} {takes} only", f"resize with {name} {takes}", find)


def _cast_to_uint8(view: View) -> Found:
    for node in view.of("Cast"):
        source, target = view.type_of(node.input[0]), view.attribute(node, "to", 0)
        kinds = {source, target}
        if TYPES["UINT8"] in kinds and source and len(kinds) == 2 and not kinds & set(FROM_OR_TO_UINT8):
            name = view.onnx.TensorProto.DataType.Name
            yield label(node), f"Cast {name(source)} -> {name(target)}"


def _uint8_compute(view: View) -> Found:
    quantising = ("Cast", "QuantizeLinear", "DequantizeLinear", "Constant")
    for node in view.nodes:
        if node.op_type in quantising:
            continue
        used = [name for name in (*node.input, *node.output) if name and view.type_of(name) == TYPES["UINT8"]]
        if used:
            yield label(node), f"{node.op_type} on uint8 {used[0]!r}"


def _foreign_type(view: View) -> Found:
    for name, kind in view.types.items():
        if kind in FOREIGN_TYPES:
            yield name, f"a tensor of {FOREIGN_TYPES[kind]}"


def _double(view: View) -> Found:
    return ((name, "a tensor of float64") for name, kind in view.types.items() if kind == 11)


def _int64_io(view: View) -> Found:
    for value in (*view.model.graph.input, *view.model.graph.output):
        if value.type.tensor_type.elem_type == 7:
            yield value.name, "an int64 input or output"


def _rank(view: View) -> Found:
    for name, shape in view.shapes.items():
        if len(shape) > MAX_RANK:
            yield name, f"rank {len(shape)}"


def _batch_lost(view: View) -> Found:
    graph = view.model.graph
    first = [view.shapes.get(value.name) for value in graph.input if value.name not in view.constants]
    if not first or not all(shape and shape[0] is None for shape in first):
        return
    for value in graph.output:
        shape = view.shapes.get(value.name)
        if shape and shape[0] is not None:
            yield value.name, f"first dimension {shape[0]} where every input's is dynamic"


def _opset_newer(view: View) -> Found:
    return [("opset_import", f"opset {view.opset}")] if SURE_OPSET < view.opset <= NEWEST_OPSET else []


def _opset_out_of_range(view: View) -> Found:
    return [] if OLDEST_OPSET <= view.opset <= NEWEST_OPSET else [("opset_import", f"opset {view.opset}")]


def _scatter(view: View) -> Found:
    for node in view.of("ScatterND"):
        reduction = view.attribute(node, "reduction", "none")
        if reduction != "none":
            yield label(node), f"reduction {reduction}"


def _top_k(view: View) -> Found:
    for node in view.of("TopK"):
        count = view.constant(node.input[1]) if len(node.input) > 1 else None
        if count is not None and int(np.max(count)) > MAX_TOP_K:
            yield label(node), f"k {int(np.max(count))}"
        elif not view.attribute(node, "sorted", 1):
            yield label(node), "sorted 0"


def _grid_sample(view: View) -> Found:
    for node in view.of("GridSample"):
        shape = view.shapes.get(node.input[0])
        if shape is not None and len(shape) != 4:
            yield label(node), f"an input of rank {len(shape)}"


def _training(view: View) -> Found:
    for node in view.of("BatchNormalization", "Dropout"):
        mode = view.attribute(node, "training_mode", 0)
        if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
            value = view.constant(node.input[2])
            mode = 1 if value is None else int(np.any(value))
        if mode:
            yield label(node), f"{node.op_type} in training mode"


RULES: tuple[Rule, ...] = (
    Rule(
        "unknown_op", "error", "TensorRT has no such op, the file brings no function body and no plugin is declared",
        "load the plugin library that implements it (--plugin), or export the model without that op", _unknown_op,
    ),
    Rule(
        "name_clash", "error", "the parser looks at the op type alone and would import the standard op of that name",
        "rename the custom op", _name_clash,
    ),
    Rule(
        "no_such_op", "error", "no opset of ONNX has this op", "put custom ops into a domain of their own", _no_schema,
    ),
    Rule(
        "unsupported_op", "error", "the parser's operator table says no", "express it by other ops before the export",
        _unsupported,
    ),
    Rule(
        "max_unpool", "error", "the parser has no MaxUnpool",
        "export vss networks, which rewrite it exactly, or use the VssMaxPool and VssMaxUnpool plugins", _unpool,
    ),
    Rule(
        "max_pool_indices", "error", "the parser refuses the indices output of MaxPool",
        "export vss networks, which rewrite it exactly, or use the VssMaxPool and VssMaxUnpool plugins", _pool_indices,
    ),
    Rule("pool_dilations", "error", "the parser pools without dilation only", "use stride instead", _pool_dilations),
    _resize("mode", "nearest", ("nearest", "linear")),
    _resize("coordinate_transformation_mode", "half_pixel", COORDINATES),
    _resize("antialias", 0, (0,)),
    _resize("keep_aspect_ratio_policy", "stretch", ("stretch",)),
    Rule(
        "cast_uint8", "error", "TensorRT converts uint8 from and to float32 and float16 only",
        "put a Cast to float32 between, or give labels as int32", _cast_to_uint8,
    ),
    Rule(
        "uint8_compute", "error", "TensorRT computes nothing on uint8", "cast to float32 first, to uint8 last",
        _uint8_compute,
    ),
    Rule("foreign_type", "error", "TensorRT has no such type", "cast it to int32, int64 or float32", _foreign_type),
    Rule("float64", "warning", "TensorRT has no float64 and narrows it", "export in float32", _double),
    Rule("int64_io", "warning", "it doubles the bytes that are copied", "give labels as int32", _int64_io),
    Rule("rank", "error", f"TensorRT's tensors have at most {MAX_RANK} dimensions", "reshape with fewer axes", _rank),
    Rule(
        "batch_lost", "error", "the exporter took the example's batch for a constant",
        "export with an example batch of 2 and a dynamic batch dimension", _batch_lost,
    ),
    Rule(
        "opset_newer", "warning", f"TensorRT 10 reads up to opset {SURE_OPSET}, TensorRT 11 up to {NEWEST_OPSET}",
        f"export with opset {SURE_OPSET}", _opset_newer,
    ),
    Rule(
        "opset", "error", f"TensorRT reads opsets {OLDEST_OPSET} to {NEWEST_OPSET}", f"export with opset {SURE_OPSET}",
        _opset_out_of_range,
    ),
    Rule("scatter_reduction", "error", "the parser scatters without reduction", "use ScatterElements", _scatter),
    Rule("top_k", "error", f"the parser takes sorted TopK with k up to {MAX_TOP_K}", "ask for fewer", _top_k),
    Rule("grid_sample", "error", "the parser samples 4-D inputs only", "merge axes by a reshape", _grid_sample),
    Rule("training_mode", "error", "engines infer", "export the network in eval mode", _training),
)  # fmt: skip
