"""Bodies of standard ops for the plugin nodes of a file: onnxruntime runs them, TensorRT replaces them by its plugins.

TensorRT's parser takes a body before a plugin, so `vss build` removes the bodies of what its plugin library holds; a
file that is built without the library keeps them. Every body is made of ops that TensorRT imports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vss.core.errors import VssError, need
from vss.ops.onnx_nodes import DOMAIN


def add_bodies(model: Any) -> list[str]:
    """Give every plugin node of a ModelProto its body; returns the names of the ops. Raises where there is none."""
    onnx = need("onnx", "export")
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if not nodes:
        raise VssError(
            "nothing in this graph has a plugin: end it in labels, or export a network with pooling indices (segnet)."
        )
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    for name in sorted({node.op_type for node in nodes}):
        first = next(node for node in nodes if node.op_type == name)
        model.functions.append(BODIES[name](_Body(onnx, name, opset), first))
    return sorted({node.op_type for node in nodes})


class _Body:
    """Collects the nodes of one function; a name of a tensor is its meaning."""

    def __init__(self, onnx: Any, name: str, opset: int) -> None:
        self._onnx, self._helper, self._name, self._opset = onnx, onnx.helper, name, opset
        self._nodes: list[Any] = []

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(self._helper.make_node(kind, inputs, [output], **attributes))
        return output

    def ints(self, values: list[int], output: str) -> str:
        return self.op("Constant", [], output, value_ints=values)

    def attribute(self, name: str) -> str:
        """An integer attribute of the node as a tensor of one element."""
        node = self._helper.make_node("Constant", [], [f"{name}_scalar"])
        kind = self._onnx.AttributeProto
        node.attribute.append(kind(name="value_int", ref_attr_name=name, type=kind.INT))
        self._nodes.append(node)
        return self.op("Reshape", [f"{name}_scalar", "one"], name)

    def function(self, inputs: list[str], outputs: list[str], attributes: list[str]) -> Any:
        opsets = [self._helper.make_opsetid("", self._opset)]
        return self._helper.make_function(DOMAIN, self._name, inputs, outputs, self._nodes, opsets, attributes)


def _seg_argmax(body: _Body, node: Any) -> Any:
    """Resize, ArgMax, Cast; the size from attributes, or from a second input."""
    settings = {each.name: each.i for each in node.attribute}
    inputs = ["logits", "like"][: len(node.input)]
    if len(inputs) == 2:
        body.op("Shape", ["like"], "size", start=2, end=4)
    else:
        body.ints([1], "one")
        body.op("Concat", [body.attribute("out_h"), body.attribute("out_w")], "size", axis=0)
    body.op("Shape", ["logits"], "maps", start=0, end=2)
    body.op("Concat", ["maps", "size"], "sizes", axis=0)
    rule = "align_corners" if settings["align_corners"] else "half_pixel"
    body.op("Resize", ["logits", "", "", "sizes"], "scores", mode="linear", coordinate_transformation_mode=rule)
    body.op("ArgMax", ["scores"], "wide", axis=1, keepdims=0)
    body.op("Cast", ["wide"], "labels", to=6)  # INT32
    return body.function(inputs, ["labels"], ["out_h", "out_w", "align_corners"])


def _max_pool(body: _Body, node: Any) -> Any:
    """The four values of a 2x2 window side by side: their maximum, and where it is."""
    body.ints([1], "one")
    body.ints([2], "two")
    body.ints([2, 2], "pair")
    body.ints([0, 0], "start")
    body.ints([2, 3], "sides")
    body.ints([4], "four")
    body.ints([0], "nil")
    body.op("Shape", ["x"], "maps", start=0, end=2)
    body.op("Shape", ["x"], "size", start=2, end=4)
    body.op("Div", ["size", "pair"], "small")
    body.op("Mul", ["small", "pair"], "even")
    body.op("Slice", ["x", "start", "even", "sides"], "filled")
    body.op("Slice", ["small", "nil", "one"], "rows")
    body.op("Slice", ["small", "one", "two"], "columns")
    body.op("Concat", ["maps", "rows", "two", "columns", "two"], "split", axis=0)
    body.op("Reshape", ["filled", "split"], "windows")
    body.op("Transpose", ["windows"], "gathered", perm=[0, 1, 2, 4, 3, 5])
    body.op("Concat", ["maps", "small", "four"], "flat", axis=0)
    body.op("Reshape", ["gathered", "flat"], "phases")
    body.ints([-1], "last")
    body.op("ReduceMax", ["phases", "last"], "y", keepdims=0)
    body.op("ArgMax", ["phases"], "phase", axis=4, keepdims=0)
    return _places(body)


def _places(body: _Body) -> Any:
    """place = (2 row + phase / 2) * W + 2 column + phase % 2, in int64 until the end."""
    body.op("Constant", [], "zero", value_int=0)
    body.op("Constant", [], "step", value_int=1)
    body.op("Constant", [], "double", value_int=2)
    body.op("Slice", ["size", "one", "two"], "width")
    for side, shape in (("rows", [-1, 1]), ("columns", [1, -1])):
        body.op("Squeeze", [side], f"{side}_count")
        body.op("Range", ["zero", f"{side}_count", "step"], f"{side}_line")
        body.ints(shape, f"{side}_shape")
        body.op("Reshape", [f"{side}_line", f"{side}_shape"], f"{side}_at")
        body.op("Mul", [f"{side}_at", "double"], f"{side}_twice")
    body.op("Div", ["phase", "double"], "down")
    body.op("Mod", ["phase", "double"], "right")
    body.op("Add", ["rows_twice", "down"], "line")
    body.op("Mul", ["line", "width"], "line_start")
    body.op("Add", ["columns_twice", "right"], "column")
    body.op("Add", ["line_start", "column"], "place")
    body.op("Cast", ["place"], "places", to=6)  # INT32
    return body.function(["x"], ["y", "places"], ["kernel"])


def _max_unpool(body: _Body, node: Any) -> Any:
    """Each value in its phase of a 2x2 window and zero in the other three; odd sizes are padded."""
    body.ints([1], "one")
    body.ints([2], "two")
    body.ints([3], "three")
    body.ints([4], "four")
    body.ints([-1], "last")
    body.ints([0], "nil")
    body.op("Shape", ["x"], "shape")
    body.op("Slice", ["shape", "three", "four"], "columns")
    body.op("Mul", ["columns", "two"], "even_width")
    body.op("Add", ["even_width", body.attribute("extra_w")], "width")
    body.op("Cast", ["places"], "place", to=7)  # INT64
    body.op("Div", ["place", "width"], "row")
    body.op("Mod", ["place", "width"], "column")
    body.op("Mod", ["row", "two"], "down")
    body.op("Mod", ["column", "two"], "right")
    body.op("Mul", ["down", "two"], "down_twice")
    body.op("Add", ["down_twice", "right"], "phase")
    body.op("Unsqueeze", ["phase", "last"], "phase_at")
    body.ints([0, 1, 2, 3], "each")
    body.op("Equal", ["phase_at", "each"], "here")
    body.op("Unsqueeze", ["x", "last"], "value")
    body.op("Constant", [], "nought", value_float=0.0)
    body.op("CastLike", ["nought", "x"], "nothing")
    body.op("Where", ["here", "value", "nothing"], "phases")
    body.op("Concat", ["shape", "two", "two"], "split", axis=0)
    body.op("Reshape", ["phases", "split"], "windows")
    body.op("Transpose", ["windows"], "gathered", perm=[0, 1, 2, 4, 3, 5])
    body.op("Slice", ["shape", "nil", "two"], "maps")
    body.op("Slice", ["shape", "two", "four"], "small")
    body.op("Mul", ["small", "two"], "even")
    body.op("Concat", ["maps", "even"], "whole", axis=0)
    body.op("Reshape", ["gathered", "whole"], "filled")
    body.ints([0, 0, 0, 0, 0, 0], "before")
    body.op("Concat", ["before", body.attribute("extra_h"), "extra_w"], "pads", axis=0)
    body.op("Pad", ["filled", "pads", "nothing"], "y")
    return body.function(["x", "places"], ["y"], ["extra_h", "extra_w"])


BODIES: dict[str, Callable[[_Body, Any], Any]] = {
    "VssMaxPool": _max_pool,
    "VssMaxUnpool": _max_unpool,
    "VssSegArgmax": _seg_argmax,
}
