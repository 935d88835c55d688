"""FP16 by onnxruntime's converter, with a list of what stays in float32: normalisation, resize, ends like softmax."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.errors import need
from vss.deploy.quantize.layers import Net, check_names, read_onnx, sort_nodes

KEEP = (
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "Sqrt", "Pow", "Div", "Reciprocal",
    "Exp", "Log", "Softmax", "LogSoftmax", "Sigmoid", "Resize",
)  # fmt: skip
"""Sums over a map and exponentials leave the 11 bits or the 65504 of float16; resizing adds an error of its own."""
NORMS = frozenset(KEEP[:14])
FLOAT, FLOAT16 = 1, 10  # onnx.TensorProto
LARGEST = 65504.0  # in float16
ELEMENTWISE = ("Add", "Sub", "Mul", "Abs", "Neg", "Min", "Max", "Clip")


def kept_nodes(net: Net, layers: Iterable[str] = ()) -> set[str]:
    """Names of the nodes that stay in float32.

    These are the operators of `KEEP`; arithmetic between or behind normalising ones up to the next layer or activation,
    so that a normalisation written out in single operators stays whole; what comes before the first layer and behind
    the last ones; and the layers asked for.
    """
    names = set(layers)
    check_names(net, names)
    kept = net.outer | {layer.node for layer in net.layers if layer.name in names}
    chain: set[str] = set()
    for node in net.nodes:
        behind = any(net.producer[name].name in chain for name in node.input if name in net.producer)
        if node.op_type in NORMS or (node.op_type in ELEMENTWISE and behind):
            chain.add(node.name)
    return kept | chain | {node.name for node in net.nodes if node.op_type in KEEP}


def to_fp16(model: Any, keep: Iterable[str]) -> Any:
    """A converted copy whose inputs and outputs have their types still.

    Args:
        keep: names of nodes that stay in float32.
    """
    float16 = need("onnxruntime.transformers.float16", "FP16")
    with _quiet(float16.logger):
        converted = float16.convert_float_to_float16(
            copy.deepcopy(model), keep_io_types=True, op_block_list=[], node_block_list=sorted(keep)
        )
    return tidy(converted)


def tidy(model: Any) -> Any:
    """Mend what the converter leaves behind, in place.

    It casts one tensor once per reader, under one name, which is no valid graph; and it rounds what passes from one
    float32 node to the next to float16 and back, which is what keeping them was to prevent.
    """
    nodes = {name: node for node in model.graph.node for name in node.output}  # of equal casts, one
    back = {name: node for name, node in nodes.items() if _casts(node, FLOAT)}
    direct = {
        name: nodes[node.input[0]].input[0]
        for name, node in back.items()
        if node.input[0] in nodes and _casts(nodes[node.input[0]], FLOAT16)
    }
    outputs = {value.name for value in model.graph.output}
    renamed = {source: name for name, source in direct.items() if name in outputs}
    whole = list({node.output[0]: node for node in nodes.values() if node.output[0] not in direct}.values())
    for node in whole:
        names = [direct.get(name, name) for name in node.input]
        node.input[:] = [renamed.get(name, name) for name in names]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    kept = [type(node).FromString(node.SerializeToString()) for node in _alive(whole, outputs)]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    sort_nodes(model)
    made = {name for node in kept for name in node.output} - outputs
    values = {value.name: value for value in model.graph.value_info if value.name in made}
    values = {name: type(value).FromString(value.SerializeToString()) for name, value in values.items()}
    del model.graph.value_info[:]
    model.graph.value_info.extend(values.values())
    return model


def _casts(node: Any, to: int) -> bool:
    """Whether a node is a cast to that type which the converter has put in."""
    added = node.name.endswith(("_cast_to_fp32_node", "_cast_to_fp16_node")) or node.name.startswith("graph_")
    return node.op_type == "Cast" and added and node.attribute[0].i == to


def _alive(nodes: Sequence[Any], outputs: set[str]) -> list[Any]:
    """Without casts that nothing reads."""
    while True:
        read = outputs | {name for node in nodes for name in node.input}
        alive = [node for node in nodes if node.op_type != "Cast" or read & set(node.output)]
        if len(alive) == len(nodes):
            return alive
        nodes = alive


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def overflow(plain: Path, keep: Sequence[str], image: np.ndarray) -> str | None:
    """A sentence where a layer of a float32 file gives on `image` what float16 cannot hold.

    onnxruntime's CPU computes float16 files in float32, where nothing overflows; a GPU does not.
    """
    onnx, ort = need("onnx", "FP16"), need("onnxruntime", "FP16")
    model = read_onnx(plain)
    layers = {layer.output: layer.name for layer in Net(model).layers if layer.name not in keep}
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in layers if name not in known)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for name, value in zip(layers, session.run(list(layers), {"image": image}), strict=True):
        if not np.abs(value).max() <= LARGEST:
            return (
                f"layer {layers[name]} gives values of {np.abs(value).max():.3g} and float16 ends at {LARGEST:.0f}: it "
                "would be infinity on a GPU; export fp32, or keep it and what reads it in float32 (--keep, "
                "precision.keep)."
            )
    return None
