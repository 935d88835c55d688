"""What TensorRT refuses or runs badly in an ONNX file, found without TensorRT, and the rules for explicit quantisation.

Symmetric INT8 (zero point 0), constant positive scales, one scale per activation, one per output channel of a weight,
biases in floating point, and quantisation placed so that layers fuse (developer guide, "Explicit Quantization").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from vss.deploy.lint_rules import FLAVOURS, FLOAT16, INT32, LETTERS, REFUSED, RULES, Found, Rule, nodes
from vss.deploy.onnx_file import PLUGINS, View, look

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["FLAVOURS", "PLUGINS", "QUANT_RULES", "REFUSED", "Finding", "lint"]

INT8_LIKE = (3, 17, 22)  # onnx.TensorProto: int8, float8e4m3fn and int4, which TensorRT quantises to
CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}  # axis of the output channels in the weight
NORMALISING = (
    "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "LpNormalization",
    "ReduceMean", "ReduceL2", "ReduceSumSquare", "Softmax", "LogSoftmax", "Sqrt", "Pow", "Div", "Reciprocal",
)  # fmt: skip
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def _dq(view: View, tensor: str) -> NodeProto | None:
    """The DequantizeLinear that makes a tensor, or None."""
    node = view.producer.get(tensor)
    return node if node is not None and node.op_type == DQ else None


def _of_constant(view: View, node: NodeProto) -> bool:
    """Whether a node of Q or DQ holds a weight: a constant, or a quantised constant."""
    maker = view.producer.get(node.input[0])
    source = maker if node.op_type == DQ and maker is not None and maker.op_type == Q else node
    return source.input[0] in view.constants


def _quantised_type(view: View, node: NodeProto) -> int:
    """Element type on the integer side; ONNX means uint8 where a QuantizeLinear says nothing."""
    named = len(node.input) > 2 and node.input[2]
    if named or node.op_type == DQ:
        return view.type_of(named or node.input[0])
    return view.attribute(node, "output_dtype", 0) or 2


@nodes(Q, DQ)
def _zero_point(view: View, node: NodeProto) -> str:
    if len(node.input) < 3 or not node.input[2]:
        return ""
    value = view.constant(node.input[2])
    if value is None:
        return f"{node.op_type} with a zero point that is computed"
    return f"{node.op_type} with zero point {_sample(value)}" if np.any(value.astype(np.float32) != 0) else ""


@nodes(Q, DQ)
def _type(view: View, node: NodeProto) -> str:
    kind = _quantised_type(view, node)
    return "" if kind in (0, INT32, *INT8_LIKE) else f"{node.op_type} with {view.type_name(kind)}"


@nodes(DQ)
def _bias(view: View, node: NodeProto) -> str:
    return "an int32 bias behind DequantizeLinear" if _quantised_type(view, node) == INT32 else ""


@nodes(Q, DQ)
def _scale_constant(view: View, node: NodeProto) -> str:
    return "" if node.input[1] in view.constants else f"{node.op_type} with a scale that is computed"


def _scale_value(wrong: Callable[[np.ndarray], np.ndarray]) -> Callable[[View], Found]:
    @nodes(Q, DQ)
    def find(view: View, node: NodeProto) -> str:
        scale = view.constant(node.input[1])
        values = [] if scale is None else scale[wrong(scale)].flatten()
        return f"{node.op_type} with scale {float(values[0])}" if len(values) else ""

    return find


@nodes(Q, DQ)
def _activation_scale(view: View, node: NodeProto) -> str:
    scale = view.constant(node.input[1])
    many = scale is not None and scale.size > 1 and not _of_constant(view, node)
    return f"{node.op_type} of an activation with {scale.size} scales" if scale is not None and many else ""


@nodes(*CONVOLUTIONS)
def _weight_axis(view: View, node: NodeProto) -> str:
    scale, axis, _ = _scales(view, node)
    return f"weight scales along axis {axis}" if scale > 1 and axis != CONVOLUTIONS[node.op_type] else ""


@nodes(*CONVOLUTIONS)
def _weight_count(view: View, node: NodeProto) -> str:
    scales, _, channels = _scales(view, node)
    return f"{scales} scales for {channels} channels" if scales > 1 and channels not in (None, scales) else ""


def _scales(view: View, node: NodeProto) -> tuple[int, int, int | None]:
    """Of a convolution's quantised weight: number of scales (0 where there are none), axis, length along it."""
    dq = _dq(view, node.input[1])
    scale = view.constant(dq.input[1]) if dq is not None else None
    if dq is None or scale is None:
        return 0, 0, None
    axis, shape = view.attribute(dq, "axis", 1), view.shapes.get(dq.input[0]) or []
    return scale.size, axis, shape[axis] if axis < len(shape) else None


@nodes(*CONVOLUTIONS)
def _half_quantised(view: View, node: NodeProto) -> str:
    image, weight = (_dq(view, name) is not None for name in node.input[:2])
    return f"{node.op_type} with only its {'input' if image else 'weight'} quantised" if image != weight else ""


@nodes(Q)
def _unmatched(view: View, node: NodeProto) -> str:
    readers = [reader.op_type for reader in view.consumers.get(node.output[0], [])] or ["nothing"]
    return next((f"an int8 tensor that {reader} reads" for reader in readers if reader != DQ), "")


@nodes("Add")
def _add(view: View, node: NodeProto) -> str:
    return "Add with both inputs dequantised" if all(_dq(view, name) is not None for name in node.input) else ""


@nodes("Concat")
def _concat(view: View, node: NodeProto) -> str:
    makers = [maker for name in node.input if (maker := _dq(view, name)) is not None]
    if makers and len(makers) < len(node.input):
        return f"{len(makers)} of {len(node.input)} inputs quantised"
    scales = {_sample(view.constant(maker.input[1])) for maker in makers}
    return f"inputs with scales {', '.join(sorted(scales))}" if len(scales) > 1 else ""


@nodes("Resize", "MaxPool")
def _resize(view: View, node: NodeProto) -> str:
    dq, readers = _dq(view, node.input[0]), view.consumers.get(node.output[0], [])
    if dq is None:
        return ""
    if not readers or any(reader.op_type != Q for reader in readers):
        return f"{node.op_type} with a dequantised input and an output that stays floating point"
    same = {_sample(view.constant(each.input[1])) for each in readers} == {_sample(view.constant(dq.input[1]))}
    return "" if same else f"{node.op_type} between two different scales"


@nodes(*NORMALISING)
def _normalisation(view: View, node: NodeProto) -> str:
    after = any(_dq(view, name) is not None for name in node.input)
    return f"{node.op_type} on a dequantised tensor" if after else ""


@nodes(Q, DQ)
def _half_opset(view: View, node: NodeProto) -> str:
    half = view.opset < 19 and view.type_of(node.input[1]) == FLOAT16
    return f"a float16 scale at opset {view.opset}" if half else ""


def _sample(value: np.ndarray | None) -> str:
    """A scale or zero point for people: the number, or the first of many."""
    if value is None:
        return "computed"
    flat = value.astype(np.float64).flatten()
    return f"{flat[0]:.6g}" if flat.size == 1 else f"{flat[0]:.6g} and {flat.size - 1} more"


NAMED_ILLEGAL = "; TensorRT 10 names it illegal, RTX 1.7 builds it, with an accuracy that nobody has measured"
QUANT_RULES: tuple[Rule, ...] = (
    Rule("q_zero_point", "EEE", "TensorRT quantises symmetrically", "quantise with symmetric=True, zero point 0",
         _zero_point),
    Rule("q_type", "EEO", "TensorRT quantises to int8, int4 and float8 only", "quantise to int8, and say it by a zero "
         "point or output_dtype: without either ONNX means uint8", _type),
    Rule("q_bias", "EEE", "TensorRT keeps biases in floating point", "leave biases out of quantisation", _bias),
    Rule("q_scale_constant", "EWW", "scales must be build-time constants" + NAMED_ILLEGAL, "store it as an initializer",
         _scale_constant),
    Rule("q_scale_value", "EEE", "a scale is a positive number", "calibrate that layer again, or leave it in floating "
         "point", _scale_value(lambda scale: ~(scale > 0))),
    Rule("q_scale_infinite", "OOO", "a scale is a finite number", "calibrate that layer again, or leave it in floating "
         "point", _scale_value(np.isposinf)),
    Rule("q_activation_scale", "EWW", "activations have one scale each" + NAMED_ILLEGAL,
         "quantise activations per tensor", _activation_scale),
    Rule("q_weight_axis", "EWW", "weights have one scale per output channel: axis 0 of Conv, axis 1 of ConvTranspose"
         + NAMED_ILLEGAL, "quantise along that axis", _weight_axis),
    Rule("q_scale_count", "EEE", "there is one scale per output channel", "quantise the weight again", _weight_count),
    Rule("q_unmatched", "EWW", "an int8 tensor is read by DequantizeLinear alone" + NAMED_ILLEGAL,
         "put Q and DQ in pairs", _unmatched),
    Rule("q_half_opset", "EWW", "float16 scales exist from opset 19 on" + NAMED_ILLEGAL, "export with opset 20",
         _half_opset),
    Rule("q_half_quantised", "WWW", "the layer runs in floating point and pays for the conversion",
         "quantise both or neither", _half_quantised),
    Rule("q_add", "WW-", "Conv + Add + ReLU fuses only when the skip branch alone is quantised",
         "take Q and DQ off the branch that comes from the convolution", _add),
    Rule("q_concat", "WWW", "every input is requantised on the way in", "give all inputs of a concat one scale",
         _concat),
    Rule("q_resize", "WWW", "the layer runs in floating point or requantises", "use the input's scale after it as "
         "well, or take Q and DQ off both sides", _resize),
    Rule("q_normalisation", "WWW", "normalisation (FeatureNorm too) loses accuracy in int8 and is not faster",
         "leave it in floating point", _normalisation),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One place: `node` is the name of a node or tensor, `detail` what is there, `reason` why it matters, `fix` what
    to do, `flavours` what each flavour of TensorRT does (`LETTERS`). An "error" keeps one of them from building the
    file, or makes it build another one than the file says; a "warning" costs time, memory or accuracy."""

    rule: str
    severity: Literal["error", "warning"]
    node: str
    detail: str
    reason: str
    fix: str
    flavours: dict[str, str]

    def __str__(self) -> str:
        named = ["TensorRT for RTX" if each == "rtx" else f"TensorRT {each}" for each in self.flavours]
        where = "" if len(named) == len(FLAVOURS) else f" ({', '.join(named)})"
        return f"{self.node}: {self.detail}: {self.reason}; {self.fix}{where}."


def lint(
    model: ModelProto | Path | str,
    *,
    plugins: Sequence[str] = PLUGINS,
    flavours: Sequence[str] = FLAVOURS,
    targets: Sequence[str] = (),
) -> list[Finding]:
    """Check a path or ModelProto against every rule of these flavours of TensorRT, errors first.

    Args:
        plugins: op types that TensorRT plugins will implement, whatever their domain.
        flavours: of "10", "11" and "rtx"; an error is one for any of them.
        targets: GPUs to build for, such as "sm86", where they are known.
    """
    view = look(model, plugins=plugins)
    view.targets = tuple(targets)
    found = []
    for rule in (*RULES, *QUANT_RULES):
        does = rule.does(flavours)
        severity: Literal["error", "warning"] = "warning" if set(does.values()) == {LETTERS["W"]} else "error"
        for node, detail in rule.find(view) if does else ():
            found.append(Finding(rule.name, severity, node, detail, rule.reason, rule.fix, does))
    return sorted(found, key=lambda finding: finding.severity != "error")
