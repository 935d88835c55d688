"""Passes over an exported ONNX graph. Each takes an onnx-graphsurgeon graph and returns how many places it changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vss.core.errors import VssError, need

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
