"""Explicit INT8: which edges of a graph carry Q/DQ, and their insertion by onnxruntime with what TensorRT allows.

TensorRT wants INT8 with zero point 0, one scale per activation and one per output channel of a weight, no quantised
bias, a pair in front of every layer, and of a residual addition the skip branch alone, so that layer, addition and
activation become one kernel. Runtimes on CPUs want other types and bits (`Int8`). onnxruntime inserts; the edges it
should have left alone are given back afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vss.core.errors import VssError, need
from vss.deploy.backends.base import Int8
from vss.deploy.quantize.layers import Net, check_names, sort_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Edge = tuple[str, int]
"""Name of a node and the index of one of its inputs."""
SYMMETRIC = Int8()
NON_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Sqrt", "Exp")
KEEPS_SIGN = ("MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Add", "Mul", "Identity")
"""Non-negative where all of their inputs are."""
LEGAL = {
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "AddQDQPairToWeight": False,  # weights are stored as INT8 and a DequantizeLinear: a quarter of the bytes
}


@dataclass
class Placement:
    """Where Q/DQ pairs stand.

    Attributes:
        layers: names of the layers that compute in INT8.
        edges: the inputs that are quantised.
        ties: sets of tensors that share one range, since a Concat or a MaxPool passes one on as the other.
        skips: name of an addition -> index of its skip branch.
    """

    layers: list[str]
    edges: set[Edge] = field(default_factory=set)
    ties: list[set[str]] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)


def place(
    net: Net, keep: Iterable[str] = (), *, first: bool = True, last: bool = False, tied: bool = True
) -> Placement:
    """Decide the edges; layers of `keep` stay in floating point, those at the input and the outputs as `first`, `last`
    say. `tied`: the inputs of a Concat share a range.

    Raises:
        VssError: a layer that does not exist, or none left to quantise.
    """
    keep = set(keep)
    check_names(net, keep)
    spared = keep | (set() if first else net.first) | (set() if last else net.last)
    chosen = [layer for layer in net.layers if layer.name not in spared]
    if not chosen:
        raise VssError(
            f"no layer is left for INT8: {len(net.layers)} layers, all of them kept in floating point; keep fewer, or "
            "export fp16 or fp32."
        )
    placement = Placement([layer.name for layer in chosen], {(layer.node, 0) for layer in chosen})
    quantised = {layer.node for layer in chosen}
    for node in reversed(net.nodes):
        if node.op_type == "Concat" and all(_leads(net, placement, out) for out in node.output):
            placement.edges |= {(node.name, index) for index in range(len(node.input))}
            if tied:
                placement.ties.append({*node.input, *_passed_on(net, node.output[0])})
        elif node.op_type == "Add":
            skip = skip_of(net, node, quantised)
            if skip is not None:
                placement.edges.add((node.name, skip))
                placement.skips[node.name] = skip
    _through_pools(net, placement)
    placement.ties = _merged(placement.ties)
    return placement


def _leads(net: Net, placement: Placement, tensor: str) -> bool:
    """Whether everything that reads a tensor reads it quantised, perhaps behind a MaxPool."""
    readers = net.consumers.get(tensor, [])
    if not readers or tensor in net.outputs:
        return False
    return all(
        _leads(net, placement, node.output[0])
        if node.op_type == "MaxPool"
        else all((node.name, index) in placement.edges for index, name in enumerate(node.input) if name == tensor)
        for node in readers
    )


def _passed_on(net: Net, tensor: str) -> set[str]:
    """A tensor and what MaxPools make of it."""
    pools = (node for node in net.consumers.get(tensor, []) if node.op_type == "MaxPool")
    return {tensor}.union(*(_passed_on(net, pool.output[0]) for pool in pools))


def skip_of(net: Net, node: NodeProto, quantised: set[str]) -> int | None:
    """Index of the skip branch of a residual addition; None when it is none.

    The other branch is the result of a quantised layer that nothing else reads; of two such layers the deeper one, so
    that a projection on the skip path counts as the skip.
    """
    sources = [net.producer.get(name) for name in node.input]
    if any(name in net.constants for name in node.input) or node.input[0] == node.input[1]:
        return None
    mains = [
        index
        for index, source in enumerate(sources)
        if source is not None and source.name in quantised and len(net.consumers[node.input[index]]) == 1
    ]
    if not mains:
        return None
    main = max(mains, key=lambda index: net.depth[sources[index].name])  # type: ignore[union-attr]
    return 1 - main


def _through_pools(net: Net, placement: Placement) -> None:
    """A MaxPool whose input is quantised for another reader and whose output is quantised computes in INT8 as well."""
    for node in reversed(net.nodes):
        if node.op_type != "MaxPool" or not _leads(net, placement, node.output[0]):
            continue
        source = node.input[0]
        edges = {(n.name, i) for n in net.consumers[source] for i, name in enumerate(n.input) if name == source}
        if edges & placement.edges:
            placement.edges.add((node.name, 0))
            placement.ties.append({source, *_passed_on(net, node.output[0])})


def _merged(ties: Iterable[set[str]]) -> list[set[str]]:
    """Sets that share a tensor become one."""
    merged: list[set[str]] = []
    for tie in ties:
        touching = [other for other in merged if other & tie]
        merged = [other for other in merged if not other & tie] + [tie.union(*touching)]
    return merged


def observed(net: Net) -> list[str]:
    """Every tensor whose range any placement could ask for, in the order of the graph."""
    placement = place(net, last=True)
    nodes = {node for node, _ in placement.edges}
    wanted = {name for node in net.nodes if node.name in nodes for name in _activations(net, node)}
    wanted |= {tensor for tie in placement.ties for tensor in tie}
    order = [*net.inputs, *(out for node in net.nodes for out in node.output)]
    return [name for name in order if name in wanted]


def _activations(net: Net, node: NodeProto) -> list[str]:
    return [name for name in node.input if name and name not in net.constants]


def tied(placement: Placement, values: Mapping[str, float]) -> dict[str, float]:
    """The ranges with every tie at its largest."""
    result = dict(values)
    for tie in placement.ties:
        known = [values[name] for name in tie if name in values]
        result |= dict.fromkeys(tie, max(known)) if known else {}
    return result


def non_negative(net: Net, tensor: str) -> bool:
    """Whether the operator that makes a tensor, or those that it only passes values on from, give nothing below 0."""
    node = net.producer.get(tensor)
    if node is None or node.op_type in NON_NEGATIVE:
        return node is not None
    if node.op_type == "Resize":
        return not any(each.s == b"cubic" for each in node.attribute) and non_negative(net, node.input[0])
    return node.op_type in KEEPS_SIGN and all(non_negative(net, name) for name in node.input)


def lower_ends(net: Net, placement: Placement, values: Mapping[str, float], style: Int8) -> dict[str, float]:
    """Tensor -> where its range begins: at 0 for uint8 where it and all that it shares its range with are not
    negative."""
    zero = {name for name in values if style.unsigned and non_negative(net, name)}
    zero -= {name for tie in placement.ties if not tie & values.keys() <= zero for name in tie}
    return {name: 0.0 if name in zero else -value for name, value in values.items()}


def insert(
    net: Net, placement: Placement, values: Mapping[str, float], path: Path, style: Int8 = SYMMETRIC
) -> ModelProto:
    """The quantised ModelProto; `values` holds the range of every tensor that an edge of the placement reads."""
    onnx, quantization = need("onnx", "INT8"), need("onnxruntime.quantization", "INT8")
    values = tied(placement, values)
    touched = {node for node, _ in placement.edges}
    nodes = [node for node in net.nodes if node.name in touched]
    for node, index in placement.edges:
        tensor = next(each for each in nodes if each.name == node).input[index]
        if tensor not in values:
            raise VssError(f"the ranges say nothing of tensor {tensor!r} of {path}; calibrate this file again.")
    cached = {name: values.get(name, 1.0) for node in nodes for name in [*_activations(net, node), *node.output]}
    ops, types = sorted({node.op_type for node in nodes}), quantization.QuantType
    with tempfile.TemporaryDirectory(prefix="vss-int8-") as folder, _quiet():
        cache, out = Path(folder) / "ranges.json", Path(folder) / "int8.onnx"
        _write_ranges(lower_ends(net, placement, cached, style), cached, cache)
        quantization.quantize_static(
            net.model,
            out,
            None,
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=types.QUInt8 if style.unsigned else types.QInt8,
            weight_type=types.QInt8,
            per_channel=True,
            reduce_range=style.weight_bits == 7,
            op_types_to_quantize=ops,
            nodes_to_quantize=[node.name for node in nodes],
            extra_options=LEGAL
            | {"OpTypesToExcludeOutputQuantization": ops, "ActivationSymmetric": not style.unsigned},
            calibration_cache_path=cache,
        )
        model = onnx.load(str(out))
    model = give_back(model, placement.edges, set(net.constants))
    if style.one_reader:
        chosen = set(placement.layers)
        _give_one_reader(model, {layer.node for layer in net.layers if layer.name in chosen})
    return model


def _write_ranges(low: Mapping[str, float], high: Mapping[str, float], path: Path) -> None:
    """Ranges in onnxruntime's own file, so that it measures nothing itself."""
    calibrate = need("onnxruntime.quantization.calibrate", "INT8")
    data = {
        name: calibrate.TensorData(lowest=np.array(low[name], np.float32), highest=np.array(value, np.float32))
        for name, value in high.items()
    }
    calibrate.save_tensors_data(calibrate.TensorsData(calibrate.CalibrationMethod.MinMax, data), path)


def give_back(model: ModelProto, edges: set[Edge], constants: set[str]) -> ModelProto:
    """Connect every reader that is not among `edges` with the tensor as it was before its Q/DQ pair: onnxruntime
    quantises a tensor for all of its readers. Pairs that nothing reads any more go.
    """
    producer = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            source = _before_pair(producer, name)
            if source is not None and source not in constants and (node.name, index) not in edges:
                node.input[index] = source
    _drop_dead_pairs(model)
    sort_nodes(model)
    return model


def _give_one_reader(model: ModelProto, layers: set[str]) -> None:
    """Put a LeakyRelu of slope 1 behind every layer without a bias whose result has several readers."""
    onnx = need("onnx", "INT8")
    reads = [*(name for node in model.graph.node for name in node.input), *(value.name for value in model.graph.output)]
    for node in [node for node in model.graph.node if node.name in layers and len(node.input) == 2]:
        tensor = node.output[0]
        if reads.count(tensor) > 1:
            node.output[0] = f"{tensor}_alone"
            behind = onnx.helper.make_node("LeakyRelu", [node.output[0]], [tensor], f"{node.name}_alone", alpha=1.0)
            model.graph.node.append(behind)
    sort_nodes(model)


def _before_pair(producer: Mapping[str, NodeProto], name: str) -> str | None:
    dequantize = producer.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = producer.get(dequantize.input[0])
    return quantize.input[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else None


def _drop_dead_pairs(model: ModelProto) -> None:
    outputs = {value.name for value in model.graph.output}
    while True:
        read = outputs | {name for node in model.graph.node for name in node.input}
        dead = [
            node
            for node in model.graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not read & set(node.output)
        ]
        if not dead:
            break
        for node in dead:
            model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime advises to pre-process, through the root logger; the exported graph is clean already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
