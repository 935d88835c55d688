"""Passes over an exported ONNX graph. Each takes an onnx-graphsurgeon graph and returns how many places it changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from vss.core.errors import VssError, need
from vss.core.networks import repeated
from vss.deploy.onnx_file import PREFIX
from vss.ops.onnx_nodes import DOMAIN

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto
    from onnx_graphsurgeon import Graph
    from torch import nn

    from vss.deploy.graph import Declared

FLOAT, UINT8 = 1, 2  # onnx.TensorProto
FROM_FLOAT = ("float16", "float32")


def clean(
    model: ModelProto, metadata: Mapping[str, str], names: Mapping[str, str] | None = None
) -> tuple[ModelProto, dict[str, Any]]:
    """Run every pass, fold constants, drop what nothing reads, sort; write `metadata` as metadata_props.

    The exporter's own per-node notes (stack traces with local paths) are dropped with the rest. `names`: of weights in
    the file -> as they are to be called (`weight_names`).

    Returns:
        The new ModelProto and {"nodes_before", "nodes_after", "passes": {name: changes}}.
    """
    need("onnx", "export")
    gs = need("onnx_graphsurgeon", "export")
    before = len(model.graph.node)
    graph = gs.import_onnx(model)
    for name, tensor in graph.tensors().items():
        tensor.name = (names or {}).get(name, name)
    changes = {name: each(graph) for name, each in PASSES.items()}
    graph.fold_constants().cleanup().toposort()
    cleaned = gs.export_onnx(graph)
    cleaned.ir_version = model.ir_version
    _drop_notes(cleaned)
    for key, value in metadata.items():
        cleaned.metadata_props.add(key=key, value=value)
    return cleaned, {"nodes_before": before, "nodes_after": len(cleaned.graph.node), "passes": changes}


def weight_names(net: nn.Module, inside: str = "") -> dict[str, str]:
    """Names of weights as the exporter writes them -> as plans say them: the first name where a module has several.

    `inside`: what stands before all names because the network was wrapped for the export.
    """
    state = net.state_dict()
    first = repeated(state)
    return {PREFIX + name: PREFIX + first.get(name, name).removeprefix(inside) for name in state}


def resize_by_scales(graph: Graph) -> int:
    """Give every Resize constant scales instead of sizes computed from the batch, where float32 holds the ratio
    exactly, so that the sampled coordinates stay the same bit for bit. (The exporter writes Concat(Shape(x)[0:2], (H,
    W)).)
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


def uint8_through_float(graph: Graph) -> int:
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


def shape_of_float(graph: Graph) -> int:
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


def identity_as_strided(graph: Graph) -> int:
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


PASSES: dict[str, Callable[[Graph], int]] = {
    "identity_as_strided": identity_as_strided,
    "resize_by_scales": resize_by_scales,
    "uint8_through_float": uint8_through_float,
    "shape_of_float": shape_of_float,
}


def _drop_notes(model: ModelProto) -> None:
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    for each in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        each.doc_string = ""
        del each.metadata_props[:]
    del graph.metadata_props[:]


def check(model: ModelProto, inputs: Mapping[str, Declared], outputs: Mapping[str, Declared]) -> None:
    """onnx.checker with shape inference, and the declared (dtype name, dims), int or symbol per dim, as they were asked
    for.
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


def inputs_of(model: ModelProto) -> dict[str, Declared]:
    """What a ModelProto declares of its inputs."""
    return {value.name: _declared(need("onnx", "export"), value) for value in model.graph.input}


def outputs_of(model: ModelProto) -> dict[str, Declared]:
    """What a ModelProto declares of its outputs."""
    return {value.name: _declared(need("onnx", "export"), value) for value in model.graph.output}


def _declared(onnx: ModuleType, value: ValueInfoProto) -> Declared:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)


# Bodies of standard ops for the plugin nodes of a file: onnxruntime runs them, TensorRT replaces them by its plugins.


def add_bodies(model: ModelProto) -> list[str]:
    """Give every plugin node of a ModelProto its body; returns the names of the ops. Raises where there is none."""
    parser = need("onnx", "export").parser
    nodes = {node.op_type: node for node in reversed(model.graph.node) if node.domain == DOMAIN}
    if not nodes:
        raise VssError(
            "nothing in this graph has a plugin: end it in labels, or export a network with pooling indices (segnet)."
        )
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    for name in sorted(nodes):
        text = BODIES[name](nodes[name])
        model.functions.append(parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{text}'))
    return sorted(nodes)


def _seg_argmax(node: NodeProto) -> str:
    """Resize, ArgMax, Cast; the size from attributes, or from a second input."""
    corners = next(each.i for each in node.attribute if each.name == "align_corners")
    text = SEG_ARGMAX_LIKE if len(node.input) == 2 else SEG_ARGMAX
    return text + LABELS.replace("RULE", "align_corners" if corners else "half_pixel")


# In ONNX's own text syntax; Cast to 6 is INT32, to 7 INT64.
SEG_ARGMAX = """\
VssSegArgmax <out_h, out_w, align_corners> (logits) => (labels) {
    one = Constant <value_ints = [1]> ()
    out_h_scalar = Constant <value_int: int = @out_h> ()
    out_h = Reshape (out_h_scalar, one)
    out_w_scalar = Constant <value_int: int = @out_w> ()
    out_w = Reshape (out_w_scalar, one)
    size = Concat <axis = 0> (out_h, out_w)
"""
SEG_ARGMAX_LIKE = """\
VssSegArgmax <out_h, out_w, align_corners> (logits, like) => (labels) {
    size = Shape <end = 4, start = 2> (like)
"""
LABELS = """\
    maps = Shape <end = 2, start = 0> (logits)
    sizes = Concat <axis = 0> (maps, size)
    scores = Resize <coordinate_transformation_mode = "RULE", mode = "linear"> (logits, , , sizes)
    wide = ArgMax <axis = 1, keepdims = 0> (scores)
    labels = Cast <to = 6> (wide)
}
"""
MAX_POOL = """\
VssMaxPool <kernel> (x) => (y, places) {
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    pair = Constant <value_ints = [2, 2]> ()
    start = Constant <value_ints = [0, 0]> ()
    sides = Constant <value_ints = [2, 3]> ()
    four = Constant <value_ints = [4]> ()
    nil = Constant <value_ints = [0]> ()
    maps = Shape <end = 2, start = 0> (x)
    size = Shape <end = 4, start = 2> (x)
    small = Div (size, pair)
    even = Mul (small, pair)
    filled = Slice (x, start, even, sides)
    rows = Slice (small, nil, one)
    columns = Slice (small, one, two)
    split = Concat <axis = 0> (maps, rows, two, columns, two)
    windows = Reshape (filled, split)
    gathered = Transpose <perm = [0, 1, 2, 4, 3, 5]> (windows)
    flat = Concat <axis = 0> (maps, small, four)
    phases = Reshape (gathered, flat)
    last = Constant <value_ints = [-1]> ()
    y = ReduceMax <keepdims = 0> (phases, last)
    phase = ArgMax <axis = 4, keepdims = 0> (phases)
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    double = Constant <value_int = 2> ()
    width = Slice (size, one, two)
    rows_count = Squeeze (rows)
    rows_line = Range (zero, rows_count, step)
    rows_shape = Constant <value_ints = [-1, 1]> ()
    rows_at = Reshape (rows_line, rows_shape)
    rows_twice = Mul (rows_at, double)
    columns_count = Squeeze (columns)
    columns_line = Range (zero, columns_count, step)
    columns_shape = Constant <value_ints = [1, -1]> ()
    columns_at = Reshape (columns_line, columns_shape)
    columns_twice = Mul (columns_at, double)
    down = Div (phase, double)
    right = Mod (phase, double)
    line = Add (rows_twice, down)
    line_start = Mul (line, width)
    column = Add (columns_twice, right)
    place = Add (line_start, column)
    places = Cast <to = 6> (place)
}
"""
"""The four values of a 2x2 window side by side: their maximum, and where it is, (2 row + phase / 2) * W + 2 column +
phase % 2."""
MAX_UNPOOL = """\
VssMaxUnpool <extra_h, extra_w> (x, places) => (y) {
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    four = Constant <value_ints = [4]> ()
    last = Constant <value_ints = [-1]> ()
    nil = Constant <value_ints = [0]> ()
    shape = Shape (x)
    columns = Slice (shape, three, four)
    even_width = Mul (columns, two)
    extra_w_scalar = Constant <value_int: int = @extra_w> ()
    extra_w = Reshape (extra_w_scalar, one)
    width = Add (even_width, extra_w)
    place = Cast <to = 7> (places)
    row = Div (place, width)
    column = Mod (place, width)
    down = Mod (row, two)
    right = Mod (column, two)
    down_twice = Mul (down, two)
    phase = Add (down_twice, right)
    phase_at = Unsqueeze (phase, last)
    each = Constant <value_ints = [0, 1, 2, 3]> ()
    here = Equal (phase_at, each)
    value = Unsqueeze (x, last)
    nought = Constant <value_float = 0.0> ()
    nothing = CastLike (nought, x)
    phases = Where (here, value, nothing)
    split = Concat <axis = 0> (shape, two, two)
    windows = Reshape (phases, split)
    gathered = Transpose <perm = [0, 1, 2, 4, 3, 5]> (windows)
    maps = Slice (shape, nil, two)
    small = Slice (shape, two, four)
    even = Mul (small, two)
    whole = Concat <axis = 0> (maps, even)
    filled = Reshape (gathered, whole)
    before = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
    extra_h_scalar = Constant <value_int: int = @extra_h> ()
    extra_h = Reshape (extra_h_scalar, one)
    pads = Concat <axis = 0> (before, extra_h, extra_w)
    y = Pad (filled, pads, nothing)
}
"""
"""Each value in its phase of a 2x2 window and zero in the other three; odd sizes are padded."""
BODIES: dict[str, Callable[[NodeProto], str]] = {
    "VssMaxPool": lambda node: MAX_POOL,
    "VssMaxUnpool": lambda node: MAX_UNPOOL,
    "VssSegArgmax": _seg_argmax,
}
