"""Passes over an exported ONNX graph. Each takes an onnx-graphsurgeon graph and returns how many places it changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vss.core.errors import VssError, need
from vss.ops.onnx_nodes import DOMAIN

FLOAT, UINT8 = 1, 2  # onnx.TensorProto
FROM_FLOAT = ("float16", "float32")


def clean(model: Any, metadata: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """Run every pass, fold constants, drop what nothing reads, sort; write `metadata` as metadata_props.

    The exporter's own per-node notes (stack traces with local paths) are dropped with the rest.

    Returns:
        The new ModelProto and {"nodes_before", "nodes_after", "passes": {name: changes}}.
    """
    need("onnx", "export")
    gs = need("onnx_graphsurgeon", "export")
    before = len(model.graph.node)
    graph = gs.import_onnx(model)
    changes = {name: each(graph) for name, each in PASSES.items()}
    graph.fold_constants().cleanup().toposort()
    cleaned = gs.export_onnx(graph)
    cleaned.ir_version = model.ir_version
    _drop_notes(cleaned)
    for key, value in metadata.items():
        cleaned.metadata_props.add(key=key, value=value)
    return cleaned, {"nodes_before": before, "nodes_after": len(cleaned.graph.node), "passes": changes}


def resize_by_scales(graph: Any) -> int:
    """Give every Resize constant scales instead of sizes computed from the batch, where that is exact.

    The exporter writes sizes as Concat(Shape(x)[0:2], (H, W)): shape arithmetic at run time. With known H and W the
    ratio is a constant; it replaces the sizes when float32 holds it exactly, so that the sampled coordinates stay the
    same bit for bit.
    """
    gs = need("onnx_graphsurgeon", "export")
    changed = 0
    for node in graph.nodes:
        if node.op != "Resize" or len(node.inputs) < 4 or node.attrs.get("axes") is not None:
            continue
        if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            continue
        scales = _scales(node.inputs[0].shape, node.outputs[0].shape)
        if scales is None:
            continue
        constant = gs.Constant(f"{node.name}.scales", np.array([1, 1, *scales], np.float32))
        node.inputs = [node.inputs[0], gs.Variable.empty(), constant]
        changed += 1
    return changed


def _scales(source: Any, target: Any) -> tuple[float, float] | None:
    """H and W ratios of two static (N, C, H, W) shapes when float32 represents both, else None."""
    if source is None or target is None or len(source) != 4 or len(target) != 4:
        return None
    pairs = list(zip(source[2:], target[2:], strict=True))
    if not all(isinstance(side, int) for pair in pairs for side in pair):
        return None
    ratios = [float(np.float32(out / have)) for have, out in pairs]
    exact = all(
        ratio * have == out and math.floor(np.float32(have) * np.float32(ratio)) == out
        for ratio, (have, out) in zip(ratios, pairs, strict=True)
    )
    return (ratios[0], ratios[1]) if exact else None


def uint8_through_float(graph: Any) -> int:
    """Put a float32 hop before every Cast to UINT8 from an integer: TensorRT has no other way to UINT8."""
    gs = need("onnx_graphsurgeon", "export")
    changed = 0
    for node in [node for node in graph.nodes if node.op == "Cast" and node.attrs["to"] == UINT8]:
        source = node.inputs[0]
        if source.dtype is not None and np.dtype(source.dtype).name in FROM_FLOAT:
            continue
        hop = gs.Variable(f"{source.name}.float", dtype=np.float32, shape=source.shape)
        name = f"{node.name}.float"
        graph.nodes.append(gs.Node("Cast", name, attrs={"to": FLOAT}, inputs=[source], outputs=[hop]))
        node.inputs = [hop]
        changed += 1
    return changed


def shape_of_float(graph: Any) -> int:
    """Read shapes of the float32 cast of a uint8 tensor in place of the tensor: TensorRT computes nothing on UINT8."""
    gs = need("onnx_graphsurgeon", "export")
    changed = 0
    for node in [node for node in graph.nodes if node.op == "Shape"]:
        source = node.inputs[0]
        if source.dtype is None or np.dtype(source.dtype) != np.uint8:
            continue
        cast = next((each for each in source.outputs if each.op == "Cast" and each.attrs["to"] == FLOAT), None)
        if cast is None:
            floats = gs.Variable(f"{source.name}.float", dtype=np.float32, shape=source.shape)
            cast = gs.Node("Cast", f"{node.name}.float", attrs={"to": FLOAT}, inputs=[source], outputs=[floats])
            graph.nodes.append(cast)
        node.inputs = [cast.outputs[0]]
        changed += 1
    return changed


def identity_as_strided(graph: Any) -> int:
    """Drop the gather by which the exporter writes a global average pool's result as a view of itself.

    `adaptive_avg_pool2d(x, 1)` becomes a mean (N, C, 1, 1), flattened, and read again by indices n * C + c computed
    from the batch: the same values in the same shape, with the channel count in its constants.
    """
    changed = 0
    for node in [node for node in graph.nodes if node.op == "Gather" and "as_strided" in node.name]:
        flat = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        source = flat.inputs[0] if flat is not None and flat.op == "Reshape" else None
        target = node.outputs[0]
        if source is None or source.shape is None or target.shape is None or len(source.shape) != 4:
            continue
        if list(source.shape[1:]) != list(target.shape[1:]) or list(source.shape[2:]) != [1, 1]:
            continue
        for reader in list(target.outputs):
            reader.inputs = [source if each is target else each for each in reader.inputs]
        node.outputs.clear()
        changed += 1
    return changed


PASSES: dict[str, Callable[[Any], int]] = {
    "identity_as_strided": identity_as_strided,
    "resize_by_scales": resize_by_scales,
    "uint8_through_float": uint8_through_float,
    "shape_of_float": shape_of_float,
}


def _drop_notes(model: Any) -> None:
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    for each in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        each.doc_string = ""
        del each.metadata_props[:]
    del graph.metadata_props[:]


def check(model: Any, inputs: Mapping[str, tuple], outputs: Mapping[str, tuple]) -> None:
    """onnx.checker with shape inference, and the declared dims: (dtype name, dims) with int or symbol name per dim.

    Raises `VssError` when a dimension that was asked to be dynamic came out fixed, or the other way round.
    """
    onnx = need("onnx", "export")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VssError(f"the exported graph is not valid ONNX ({str(error).splitlines()[0]}).") from error
    for values, wanted in ((model.graph.input, inputs), (model.graph.output, outputs)):
        declared = {value.name: _declared(onnx, value) for value in values}
        if declared != dict(wanted):
            raise VssError(f"the exported graph declares {declared}; expected {dict(wanted)}.")


def _declared(onnx: Any, value: Any) -> tuple[str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)


# Bodies of standard ops for the plugin nodes of a file: onnxruntime runs them, TensorRT replaces them by its plugins.


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
