"""What TensorRT refuses or runs badly in an ONNX file, found without TensorRT, and the rules for explicit quantisation.

Symmetric INT8 (zero point 0), constant positive scales, one scale per activation, one per output channel of a weight,
biases in floating point, and quantisation placed so that layers fuse (developer guide, "Explicit Quantization").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vss.deploy.lint_rules import RULES, Found, Rule, Severity
from vss.deploy.onnx_file import PLUGINS, View, label, look

__all__ = ["PLUGINS", "QUANT_RULES", "Finding", "lint", "rows"]

INT8_LIKE = {3: "int8", 17: "float8e4m3fn", 22: "int4"}  # onnx.TensorProto types that TensorRT quantises to
CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}  # axis of the output channels in the weight
NORMALISING = (
    "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "LpNormalization",
    "ReduceMean", "ReduceL2", "ReduceSumSquare", "Softmax", "LogSoftmax", "Sqrt", "Pow", "Div", "Reciprocal",
)  # fmt: skip
FLOAT16, INT32 = 10, 6
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def _name(view: View, node: Any) -> str:
    return label(node) if node.name else f"{node.op_type} of {node.input[0]}"


def _dq(view: View, tensor: str) -> Any | None:
    """The DequantizeLinear that makes a tensor, or None."""
    node = view.producer.get(tensor)
    return node if node is not None and node.op_type == DQ else None


def _of_constant(view: View, dq: Any) -> bool:
    """Whether a DequantizeLinear holds a weight: an integer constant, or a quantised constant."""
    source = dq.input[0]
    maker = view.producer.get(source)
    if maker is not None and maker.op_type == Q:
        source = maker.input[0]
    return source in view.constants


def _quantised_type(view: View, node: Any) -> int:
    """Element type on the integer side; ONNX means uint8 where a QuantizeLinear says nothing."""
    if len(node.input) > 2 and node.input[2]:
        return view.type_of(node.input[2])
    if node.op_type == DQ:
        return view.type_of(node.input[0])
    return view.attribute(node, "output_dtype", 0) or 2


def _zero_point(view: View) -> Found:
    for node in view.of(Q, DQ):
        if len(node.input) > 2 and node.input[2]:
            value = view.constant(node.input[2])
            if value is None:
                yield _name(view, node), f"{node.op_type} with a zero point that is computed"
            elif np.any(value.astype(np.float32) != 0):
                yield _name(view, node), f"{node.op_type} with zero point {_sample(value)}"


def _type(view: View) -> Found:
    for node in view.of(Q, DQ):
        kind = _quantised_type(view, node)
        if kind not in (0, INT32) and kind not in INT8_LIKE:
            yield _name(view, node), f"{node.op_type} with {view.onnx.TensorProto.DataType.Name(kind)}"


def _bias(view: View) -> Found:
    for node in view.of(DQ):
        if _quantised_type(view, node) == INT32:
            yield _name(view, node), "an int32 bias behind DequantizeLinear"


def _scale_constant(view: View) -> Found:
    for node in view.of(Q, DQ):
        if view.constant(node.input[1]) is None:
            yield _name(view, node), f"{node.op_type} with a scale that is computed"


def _scale_value(view: View) -> Found:
    for node in view.of(Q, DQ):
        scale = view.constant(node.input[1])
        if scale is None:
            continue
        values = scale.astype(np.float64)
        if not np.all(np.isfinite(values) & (values > 0)):
            worst = values[~(np.isfinite(values) & (values > 0))]
            yield _name(view, node), f"{node.op_type} with scale {worst.flat[0]}"


def _activation_scale(view: View) -> Found:
    for node in view.of(Q, DQ):
        scale = view.constant(node.input[1])
        constant = node.input[0] in view.constants if node.op_type == Q else _of_constant(view, node)
        if scale is not None and scale.size > 1 and not constant:
            yield _name(view, node), f"{node.op_type} of an activation with {scale.size} scales"


def _weights(view: View) -> Iterator[tuple[Any, Any]]:
    """(convolution, DequantizeLinear of its weight)."""
    for node in view.of(*CONVOLUTIONS):
        dq = _dq(view, node.input[1])
        if dq is not None:
            yield node, dq


def _weight_axis(view: View) -> Found:
    for node, dq in _weights(view):
        scale = view.constant(dq.input[1])
        axis = view.attribute(dq, "axis", 1)
        if scale is not None and scale.size > 1 and axis != CONVOLUTIONS[node.op_type]:
            yield label(node), f"weight scales along axis {axis}"


def _weight_count(view: View) -> Found:
    for _, dq in _weights(view):
        scale, shape = view.constant(dq.input[1]), view.shapes.get(dq.input[0])
        axis = view.attribute(dq, "axis", 1)
        if scale is None or scale.size < 2 or shape is None or axis >= len(shape):
            continue
        if shape[axis] is not None and shape[axis] != scale.size:
            yield _name(view, dq), f"{scale.size} scales for {shape[axis]} channels"


def _half_quantised(view: View) -> Found:
    for node in view.of(*CONVOLUTIONS):
        image, weight = (_dq(view, name) is not None for name in node.input[:2])
        if image != weight:
            yield label(node), f"{node.op_type} with only its {'input' if image else 'weight'} quantised"


def _unmatched(view: View) -> Found:
    for node in view.of(Q):
        readers = view.consumers.get(node.output[0], [])
        if not readers or any(reader.op_type != DQ for reader in readers):
            other = next((reader.op_type for reader in readers if reader.op_type != DQ), "nothing")
            yield _name(view, node), f"an int8 tensor that {other} reads"


def _add(view: View) -> Found:
    for node in view.of("Add"):
        if all(_dq(view, name) is not None for name in node.input):
            yield label(node), "Add with both inputs dequantised"


def _concat(view: View) -> Found:
    for node in view.of("Concat"):
        makers = [maker for name in node.input if (maker := _dq(view, name)) is not None]
        if not makers:
            continue
        if len(makers) < len(node.input):
            yield label(node), f"{len(makers)} of {len(node.input)} inputs quantised"
            continue
        scales = {_sample(view.constant(maker.input[1])) for maker in makers}
        if len(scales) > 1:
            yield label(node), f"inputs with scales {', '.join(sorted(scales))}"


def _resize(view: View) -> Found:
    for node in view.of("Resize", "MaxPool"):
        dq = _dq(view, node.input[0])
        if dq is None:
            continue
        readers = view.consumers.get(node.output[0], [])
        quantised = [reader for reader in readers if reader.op_type == Q]
        if not quantised or len(quantised) != len(readers):
            yield label(node), f"{node.op_type} with a dequantised input and an output that stays floating point"
        elif {_sample(view.constant(r.input[1])) for r in quantised} != {_sample(view.constant(dq.input[1]))}:
            yield label(node), f"{node.op_type} between two different scales"


def _normalisation(view: View) -> Found:
    for node in view.of(*NORMALISING):
        if any(_dq(view, name) is not None for name in node.input):
            yield label(node), f"{node.op_type} on a dequantised tensor"


def _half_opset(view: View) -> Found:
    if view.opset >= 19:
        return
    for node in view.of(Q, DQ):
        if view.type_of(node.input[1]) == FLOAT16:
            yield _name(view, node), f"a float16 scale at opset {view.opset}"


def _sample(value: np.ndarray | None) -> str:
    """A scale or zero point for people: the number, or the first of many."""
    if value is None:
        return "computed"
    flat = value.astype(np.float64).flatten()
    return f"{flat[0]:.6g}" if flat.size == 1 else f"{flat[0]:.6g} and {flat.size - 1} more"


QUANT_RULES: tuple[Rule, ...] = (
    Rule(
        "q_zero_point", "error", "TensorRT quantises symmetrically", "quantise with symmetric=True, zero point 0",
        _zero_point,
    ),
    Rule(
        "q_type", "error", "TensorRT quantises to int8, int4 and float8 only", "quantise to int8, and say it by a zero "
        "point or output_dtype: without either ONNX means uint8", _type,
    ),
    Rule("q_bias", "error", "TensorRT keeps biases in floating point", "leave biases out of quantisation", _bias),
    Rule("q_scale_constant", "error", "scales must be build-time constants", "store it as an initializer",
         _scale_constant),
    Rule("q_scale_value", "error", "a scale is a positive finite number", "calibrate that layer again, or leave it in "
         "floating point", _scale_value),
    Rule("q_activation_scale", "error", "activations have one scale each", "quantise activations per tensor",
         _activation_scale),
    Rule("q_weight_axis", "error", "weights have one scale per output channel: axis 0 of Conv, axis 1 of ConvTranspose",
         "quantise along that axis", _weight_axis),
    Rule("q_scale_count", "error", "there is one scale per output channel", "quantise the weight again", _weight_count),
    Rule("q_unmatched", "error", "an int8 tensor is read by DequantizeLinear alone", "put Q and DQ in pairs",
         _unmatched),
    Rule("q_half_opset", "error", "float16 scales exist from opset 19 on", "export with opset 20", _half_opset),
    Rule("q_half_quantised", "warning", "the layer runs in floating point and pays for the conversion",
         "quantise both or neither", _half_quantised),
    Rule("q_add", "warning", "Conv + Add + ReLU fuses only when the skip branch alone is quantised",
         "take Q and DQ off the branch that comes from the convolution", _add),
    Rule("q_concat", "warning", "every input is requantised on the way in", "give all inputs of a concat one scale",
         _concat),
    Rule("q_resize", "warning", "the layer runs in floating point or requantises", "use the input's scale after it as "
         "well, or take Q and DQ off both sides", _resize),
    Rule("q_normalisation", "warning", "normalisation (FeatureNorm too) loses accuracy in int8 and is not faster",
         "leave it in floating point", _normalisation),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One place: `node` is the name of a node or tensor, `detail` what is there, `reason` why it matters, `fix` what
    to do. An "error" keeps TensorRT from building the file; a "warning" costs time, memory or accuracy."""

    rule: str
    severity: Severity
    node: str
    detail: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.detail}: {self.reason}; {self.fix}."


def lint(model: Any, *, plugins: Sequence[str] = PLUGINS) -> list[Finding]:
    """Check a path or ModelProto against every rule, errors first; `plugins` are op types that TensorRT plugins will
    implement, whatever their domain.
    """
    view = look(model, plugins=plugins)
    found = [
        Finding(rule.name, rule.severity, node, detail, rule.reason, rule.fix)
        for rule in (*RULES, *QUANT_RULES)
        for node, detail in rule.find(view)
    ]
    return sorted(found, key=lambda finding: finding.severity != "error")


def rows(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [asdict(finding) for finding in findings]
