"""The table of TensorRT's rules for ordinary graphs; those for quantised ones are in `vss.deploy.lint`.

A rule is a row: name, what each flavour of TensorRT does, reason, fix, and a function that finds places in a `View`.
Column rtx is what parser and builder of TensorRT for RTX do: tests/deploy/test_lint_parser.py runs every row's graph
through both, and tests/deploy/lint_table.py writes the list of ops. Columns 10 and 11 are by the public ONNX parser of
10.1, its changes up to 10.6, the headers of 10.16 and 11.1, and the documentation of 11.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vss.deploy.onnx_file import View, label

if TYPE_CHECKING:
    from onnx import NodeProto

FLAVOURS = ("10", "11", "rtx")
REFUSED = "refused"
LETTERS = {"E": REFUSED, "O": "builds another engine", "W": "warning"}
"""What a flavour does with a finding; the first two are errors."""
Found = Iterable[tuple[str, str]]
"""Places of one rule: (name of the node or tensor, what is there)."""

OPS = json.loads(Path(__file__).with_name("parser_ops.json").read_text())
ELSEWHERE = ("MaxUnpool", "DeformConv")  # has a rule of its own; is a plugin of TensorRT 10.1 and newer, not of RTX
UINT8, INT32, INT64, BOOL, FLOAT16, DOUBLE = 2, 6, 7, 9, 10, 11  # onnx.TensorProto
FLOATS, FLOAT8 = {1, FLOAT16}, 17
FOREIGN = {4, 5, 8, 12, 13, 14, 15, 18, 19, 20, 21, 25, 26}
COORDINATES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
MAX_RANK, MAX_TOP_K, FP8_SINCE = 8, 3840, 89
OLDEST_OPSET, SURE_OPSET, NEWEST_OPSET = 9, 20, 25


@dataclass(frozen=True)
class Rule:
    """One row of the table; `on` has a letter of `LETTERS` or "-" for each of `FLAVOURS`."""

    name: str
    on: str
    reason: str
    fix: str
    find: Callable[[View], Found]

    def does(self, flavours: Sequence[str] = FLAVOURS) -> dict[str, str]:
        """What these flavours do with a place of it; those that do nothing are left out."""
        on = zip(FLAVOURS, self.on, strict=True)
        return {flavour: LETTERS[letter] for flavour, letter in on if flavour in flavours and letter != "-"}


def nodes(*ops: str) -> Callable[[Callable[[View, NodeProto], str]], Callable[[View], Found]]:
    """Makes a rule of a check that says what is there of one node, or nothing; of every node where no op is named."""

    def rule(check: Callable[[View, NodeProto], str]) -> Callable[[View], Found]:
        return lambda view: (
            (label(node), words) for node in (view.of(*ops) if ops else view.nodes) if (words := check(view, node))
        )

    return rule


def _ops(*ops: str) -> Callable[[View], Found]:
    return nodes(*ops)(lambda view, node: f"op {node.op_type}")


def _typed(kinds: set[int], *ops: str) -> Callable[[View], Found]:
    """Nodes whose first input is of one of the types."""
    return nodes(*ops)(
        lambda view, node: (
            f"{node.op_type} of {view.type_name(kind)}" if (kind := view.type_of(node.input[0])) in kinds else ""
        )
    )


def _attribute(op: str, name: str, default: object, *allowed: object) -> Callable[[View], Found]:
    return nodes(op)(
        lambda view, node: f"{name} {value}" if (value := view.attribute(node, name, default)) not in allowed else ""
    )


def _tensors(kinds: set[int]) -> Callable[[View], Found]:
    return lambda view: (
        (name, f"a tensor of {view.type_name(kind).lower().replace('double', 'float64')}")
        for name, kind in view.types.items()
        if kind in kinds
    )


def _known(view: View) -> set[str]:
    return {schema.name for schema in view.onnx.defs.get_all_schemas() if not schema.domain}


def _custom(view: View, *, among: Callable[[str], bool]) -> Found:
    of_others = (node for node in view.nodes if node.domain not in ("", "ai.onnx") and among(node.op_type))
    return ((label(node), f"op {node.domain}::{node.op_type}") for node in of_others)


def _unknown_op(view: View) -> Found:
    ours = view.plugins | view.functions | _known(view)
    return _custom(view, among=lambda op: op not in ours)


def _no_schema(view: View) -> Found:
    ours = _known(view) | view.functions
    return ((label(node), f"op {node.op_type}") for node in view.of() if node.op_type not in ours)


def _onnx_fault(view: View, *, mixed: bool) -> Found:
    """What ONNX's own inference says of the file."""
    if view.fault and ("inconsistent type" in view.fault) is mixed:
        node = re.search(r"node name: ([^)]+)\)", view.fault) or re.search(r"op_type:(\w+)", view.fault)
        words = re.sub(r"\[\w+\] |Inference error\(s\): |\(op_type:.*?\):? ", "", view.fault)
        yield node[1] if node else "graph", words


def _second(op: str, word: str) -> Callable[[View], Found]:
    return nodes(op)(lambda view, node: f"{word} {node.output[1]!r}" if any(node.output[1:]) else "")


@nodes("MaxPool", "AveragePool", "LpPool")
def _pool_dilations(view: View, node: NodeProto) -> str:
    dilations = view.attribute(node, "dilations", [1])
    return f"dilations {list(dilations)}" if any(each != 1 for each in dilations) else ""


def _resize(name: str, default: object, *allowed: object, on: str = "EEE") -> Rule:
    takes = f"{name} {', '.join(map(str, allowed))}"
    find = _attribute("Resize", name, default, *allowed)
    return Rule(f"resize_{name}", on, f"the parser's table has {takes} only", f"resize with {takes}", find)


def _cast(among: set[int], without: set[int]) -> Callable[[View], Found]:
    """Casts between two types of which one is `among` these and none `without`."""

    @nodes("Cast", "CastLike")
    def find(view: View, node: NodeProto) -> str:
        source, to = view.type_of(node.input[0]), view.attribute(node, "to", 0) or view.type_of(node.output[0])
        wrong = source and to and source != to and {source, to} & among and not {source, to} & without
        return f"{node.op_type} {view.type_name(source)} -> {view.type_name(to)}" if wrong else ""

    return find


@nodes()
def _uint8_compute(view: View, node: NodeProto) -> str:
    if node.op_type in ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Constant", "Identity"):
        return ""
    used = [name for name in (*node.input, *node.output) if name and view.type_of(name) == UINT8]
    return f"{node.op_type} on uint8 {used[0]!r}" if used else ""


def _fp8(view: View, *, named: bool) -> Found:
    """float8 where no target is named, or for targets that are too old for it."""
    old = [target for target in view.targets if int(target.removeprefix("sm")) < FP8_SINCE]
    name = next((name for name, kind in view.types.items() if kind == FLOAT8), None)
    if name is not None and (old if named else not view.targets):
        yield name, f"float8 for {', '.join(old)}" if named else "float8"


def _int64_io(view: View) -> Found:
    ends = (*view.model.graph.input, *view.model.graph.output)
    return ((each.name, "an int64 input or output") for each in ends if each.type.tensor_type.elem_type == INT64)


def _batch_lost(view: View) -> Found:
    graph = view.model.graph
    first = [view.shapes.get(value.name) for value in graph.input if value.name not in view.constants]
    if first and all(shape and shape[0] is None for shape in first):
        for value in graph.output:
            shape = view.shapes.get(value.name)
            if shape and shape[0] is not None:
                yield value.name, f"first dimension {shape[0]} where every input's is dynamic"


def _opset(*ranges: range) -> Callable[[View], Found]:
    return lambda view: [("opset_import", f"opset {view.opset}")] if any(view.opset in each for each in ranges) else []


@nodes("TopK")
def _top_k(view: View, node: NodeProto) -> str:
    count = view.constant(node.input[1]) if len(node.input) > 1 else None
    return f"k {int(np.max(count))}" if count is not None and np.max(count) > MAX_TOP_K else ""


@nodes("GridSample")
def _grid_sample(view: View, node: NodeProto) -> str:
    rank = len(view.shapes.get(node.input[0], [None] * 4))
    return f"an input of rank {rank}" if rank != 4 else ""


@nodes("BatchNormalization", "Dropout")
def _training(view: View, node: NodeProto) -> str:
    mode = view.attribute(node, "training_mode", 0)
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        value = view.constant(node.input[2])
        mode = 1 if value is None else int(np.any(value))
    return f"{node.op_type} in training mode" if mode else ""


POOLING = "export vss networks, which rewrite it exactly, or use the VssMaxPool and VssMaxUnpool plugins"
BY_MATMUL = "add by a OneHot of the indices and a MatMul"
RULES: tuple[Rule, ...] = (
    Rule("unknown_op", "EEE",
         "TensorRT has no such op, the file brings no function body and no plugin is declared",
         "load the plugin library that implements it (--plugin), or export the model without that op", _unknown_op),
    Rule("name_clash", "OOO", "the parser looks at the op type alone and imports the standard op of that name",
         "rename the custom op", lambda view: _custom(view, among=_known(view).__contains__)),
    Rule("no_such_op", "EEE", "no opset of ONNX has this op", "put custom ops into a domain of their own", _no_schema),
    Rule("unsupported_op", "EEE", "the parser says that it has no such op", "express it by other ops before the export",
         _ops(*(op for op in OPS["unsupported"] if op not in ELSEWHERE))),
    Rule("rtx_op", "--E", "TensorRT for RTX parses it in part and builds it not at all without a GPU",
         "express it by other ops before the export", _ops(*OPS["not_built"])),
    Rule("mixed_types", "EEE", "a node takes one type", "cast one of them",
         lambda view: _onnx_fault(view, mixed=True)),
    Rule("onnx_check", "WWW", "ONNX's own checks fail, and TensorRT goes by its own", "export again, or correct the "
         "declared type, shape or opset", lambda view: _onnx_fault(view, mixed=False)),
    Rule("max_unpool", "EEE", "the parser has no MaxUnpool", POOLING, _ops("MaxUnpool")),
    Rule("max_pool_indices", "EEE", "the parser refuses the indices output of MaxPool", POOLING,
         _second("MaxPool", "indices")),
    Rule("norm_outputs", "EEE", "the parser refuses further outputs of LayerNormalization", "leave them out",
         _second("LayerNormalization", "mean")),
    Rule("pool_dilations", "EEE", "the parser pools without dilation only", "use stride instead", _pool_dilations),
    _resize("mode", "nearest", "nearest", "linear", on="W--"),
    _resize("coordinate_transformation_mode", "half_pixel", *COORDINATES),
    _resize("antialias", 0, 0),
    _resize("keep_aspect_ratio_policy", "stretch", "stretch"),
    Rule("resize_type", "EEE", "TensorRT resizes floating point and int8 only", "resize in float32 and cast after it",
         _typed({INT32, INT64, BOOL}, "Resize")),
    Rule("reduce_bool", "EEE", "TensorRT reduces numbers only", "cast to int32 first and back after it",
         _typed({BOOL}, "ReduceMax", "ReduceMin")),
    Rule("cast_uint8", "WW-", "the headers of 10.16 and 11.1 convert uint8 from and to float32 and float16 only",
         "put a Cast to float32 between, or give labels as int32", _cast({UINT8}, FLOATS)),
    Rule("cast_low", "EEE", "QuantizeLinear and DequantizeLinear alone make and read this type", "quantise to it",
         _cast({FLOAT8, 22, 23}, set())),
    Rule("uint8_compute", "EEE", "TensorRT computes nothing on uint8", "cast to float32 first, to uint8 last",
         _uint8_compute),
    Rule("foreign_type", "EEE", "TensorRT has no such type", "cast it to int32, int64 or float32", _tensors(FOREIGN)),
    Rule("float64", "WWW", "TensorRT has no float64 and narrows it", "export in float32", _tensors({DOUBLE})),
    Rule("fp8", "WWW", "GPUs from compute capability 8.9 on have it", "name the --targets, or use int8",
         lambda view: _fp8(view, named=False)),
    Rule("fp8_target", "--E", "GPUs from compute capability 8.9 on have it", "build for sm89 or newer, or use int8",
         lambda view: _fp8(view, named=True)),
    Rule("int64_io", "WWW", "it doubles the bytes that are copied", "give labels as int32", _int64_io),
    Rule("rank", "EEE", f"TensorRT's tensors have at most {MAX_RANK} dimensions", "reshape with fewer axes",
         lambda view: ((name, f"rank {len(each)}") for name, each in view.shapes.items() if len(each) > MAX_RANK)),
    Rule("batch_lost", "OOO", "the exporter took the example's batch for a constant",
         "export with an example batch of 2 and a dynamic batch dimension", _batch_lost),
    Rule("opset_newer", "W--", f"TensorRT 10 reads up to opset {SURE_OPSET}, TensorRT 11 up to {NEWEST_OPSET}",
         f"export with opset {SURE_OPSET}", _opset(range(SURE_OPSET + 1, NEWEST_OPSET + 1))),
    Rule("opset", "EEW", f"TensorRT reads opsets {OLDEST_OPSET} to {NEWEST_OPSET}", f"export with opset {SURE_OPSET}",
         _opset(range(OLDEST_OPSET), range(NEWEST_OPSET + 1, 1 << 16))),
    Rule("scatter_reduction", "EEE", "the parser scatters without reduction", BY_MATMUL,
         _attribute("ScatterND", "reduction", "none", "none")),
    Rule("scatter_elements", "--E", "TensorRT for RTX has no plugin that scatters with a reduction", BY_MATMUL,
         _attribute("ScatterElements", "reduction", "none", "none")),
    Rule("top_k", "EEE", f"TensorRT takes k up to {MAX_TOP_K}", "ask for fewer", _top_k),
    Rule("top_k_sorted", "W--", "the parser's table takes sorted TopK only", "ask for sorted values",
         _attribute("TopK", "sorted", 1, 1)),
    Rule("grid_sample", "W--", "the parser's table has 4-D inputs only", "merge axes by a reshape", _grid_sample),
    Rule("training_mode", "EEE", "engines infer", "export the network in eval mode", _training),
)  # fmt: skip
