"""A graph for every rule of the lint, graphs without findings, and one for every op that RTX never builds."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.deploy.lint_graphs import (
    F16,
    F32,
    I32,
    I64,
    U8,
    Case,
    cast,
    clash,
    computed_scale,
    convolution,
    half_scales,
    join,
    model,
    nine,
    one,
    pooled,
    quantised,
    resize,
    unmatched,
)

BOOL, F8 = TensorProto.BOOL, TensorProto.FLOAT8E4M3FN


def float8() -> onnx.ModelProto:
    """x -> Q -> DQ -> Relu in float8."""
    made = quantised()()
    zero = next(each for each in made.graph.initializer if each.name == "zero")
    zero.CopyFrom(helper.make_tensor("zero", F8, [], [0.0]))
    return made


def attention() -> onnx.ModelProto:
    return model([helper.make_node("Attention", ["x"] * 3, ["y"], name="planted")], opset=23)


def onto_one_place(op: str) -> Case:
    """Adds 1 at places of x."""
    nd = op == "ScatterND"
    extra: dict[str, np.ndarray] = {
        "i": np.zeros((1, 4) if nd else (1, 1, 1, 1), np.int64),
        "u": np.ones(1 if nd else (1, 1, 1, 1), np.float32),
    }
    return one(op, reduction="add", inputs=("i", "u"), extra=extra, image=(F32, [1, 4, 8, 8]), out=(F32, [1, 4, 8, 8]))


def top_k(k: int, **attributes: int) -> Case:
    ends = {"image": (F32, ["batch", 5000]), "out": (F32, ["batch", k])}
    return one("TopK", inputs=("k",), extra={"k": np.array([k])}, outputs=["y", "i"], **ends, **attributes)


PLANTED: dict[str, tuple[str, str, Case]] = {
    # rule: (node, words of the detail, graph)
    "unknown_op": ("planted", "op mine::Swirl", one("Swirl", domain="mine")),
    "name_clash": ("planted", "op mine::Relu", clash),
    "no_such_op": ("planted", "op Swirl", one("Swirl")),
    "unsupported_op": ("planted", "op Det", one("Det", out=(F32, ["batch", 4]))),
    "max_unpool": (
        "planted",
        "op MaxUnpool",
        one(
            "MaxUnpool",
            extra={"i": np.zeros((1, 4, 8, 8), np.int64)},
            inputs=("i",),
            kernel_shape=[2, 2],
            strides=[2, 2],
            out=(F32, ["batch", 4, 16, 16]),
        ),
    ),
    "max_pool_indices": ("planted", "indices 'where'", one("MaxPool", outputs=["y", "where"], kernel_shape=[1, 1])),
    "norm_outputs": (
        "planted",
        "mean 'mean'",
        one("LayerNormalization", inputs=("s",), extra={"s": np.ones(8, np.float32)}, outputs=["y", "mean"]),
    ),
    "pool_dilations": (
        "planted",
        r"dilations \[2, 2\]",
        one("MaxPool", kernel_shape=[3, 3], dilations=[2, 2], pads=[2] * 4),
    ),
    "resize_mode": ("planted", "mode cubic", resize(mode="cubic")),
    "resize_coordinate_transformation_mode": (
        "planted",
        "half_pixel_symmetric",
        resize(coordinate_transformation_mode="half_pixel_symmetric"),
    ),
    "resize_antialias": ("planted", "antialias 1", resize(antialias=1)),
    "resize_keep_aspect_ratio_policy": (
        "planted",
        "not_larger",
        one(
            "Resize",
            extra={"z": np.array([1, 4, 16, 16])},
            inputs=("", "", "z"),
            mode="linear",
            keep_aspect_ratio_policy="not_larger",
            image=(F32, [1, 4, 8, 8]),
            out=(F32, [1, 4, 8, 8]),
        ),
    ),
    "cast_uint8": ("planted", "Cast INT64 -> UINT8", cast(I64, U8)),
    "uint8_compute": (
        "planted",
        "Transpose on uint8 'x'",
        one("Transpose", perm=[0, 2, 3, 1], image=(U8, ["batch", 4, 8, 8]), out=(U8, ["batch", 8, 8, 4])),
    ),
    "foreign_type": ("y", "a tensor of uint16", cast(F32, TensorProto.UINT16)),
    "float64": ("y", "a tensor of float64", cast(F32, TensorProto.DOUBLE)),
    "int64_io": ("y", "int64", one("ArgMax", axis=1, keepdims=0, out=(I64, ["batch", 8, 8]))),
    "rank": ("deep", "rank 9", nine),
    "batch_lost": ("y", "first dimension 2", one("Relu", out=(F32, [2, 4, 8, 8]))),
    "opset_newer": ("opset_import", "opset 22", one("Relu", opset=22)),
    "opset": ("opset_import", "opset 26", one("Relu", opset=26)),
    "scatter_reduction": ("planted", "reduction add", onto_one_place("ScatterND")),
    "scatter_elements": ("planted", "reduction add", onto_one_place("ScatterElements")),
    "rtx_op": ("planted", "op Attention", attention),
    "mixed_types": (
        "planted",
        r"inconsistent type tensor\(float\)",
        one("Add", inputs=("c",), extra={"c": np.ones(1, np.float32)}, image=(F16, ["b", 4]), out=(F16, ["b", 4])),
    ),
    "onnx_check": ("planted", "differ in dimension 3: .8. vs .9.", one("Relu", out=(F32, ["batch", 4, 8, 9]))),
    "resize_type": (
        "planted",
        "Resize of INT32",
        resize(mode="nearest", image=(I32, ["batch", 4, 8, 8]), out=(I32, ["batch", 4, 16, 16])),
    ),
    "reduce_bool": (
        "planted",
        "ReduceMax of BOOL",
        one("ReduceMax", inputs=("a",), extra={"a": np.array([1])}, image=(BOOL, ["b", 4]), out=(BOOL, ["b", 1])),
    ),
    "cast_low": ("planted", "Cast FLOAT -> FLOAT8E4M3FN", cast(F32, F8)),
    "fp8": ("d_q", "float8", float8),
    "fp8_target": ("d_q", "float8 for sm86", float8),
    "top_k": ("planted", "k 4000", top_k(4000)),
    "top_k_sorted": ("planted", "sorted 0", top_k(4, sorted=0)),
    "grid_sample": (
        "planted",
        "rank 5",
        one(
            "GridSample",
            inputs=("grid",),
            extra={"grid": np.zeros((1, 2, 2, 2, 3), np.float32)},
            image=(F32, [1, 4, 8, 8, 8]),
            out=(F32, [1, 4, 2, 2, 2]),
        ),
    ),
    "training_mode": (
        "planted",
        "Dropout in training mode",
        one("Dropout", inputs=("r", "t"), extra={"r": np.array(0.5, np.float32), "t": np.array(True)}),
    ),
    "q_zero_point": ("d.q", "zero point 3", quantised(zero=np.array(3, np.int8))),
    "q_type": ("d.q", "UINT8", quantised(zero=np.array(0, np.uint8))),
    "q_bias": ("bias.dq", "int32 bias", convolution(bias=True)),
    "q_scale_constant": ("d.q", "a scale that is computed", computed_scale),
    "q_scale_value": ("d.q", "scale nan", quantised(scale=np.array(np.nan, np.float32))),
    "q_scale_infinite": ("d.q", "scale inf", quantised(scale=np.array(np.inf, np.float32))),
    "q_activation_scale": (
        "d.q",
        "4 scales",
        quantised(scale=np.full(4, 0.1, np.float32), zero=np.zeros(4, np.int8)),
    ),
    "q_weight_axis": ("planted", "axis 1", convolution(axis=1)),
    "q_scale_count": ("planted", "3 scales for 4 channels", convolution(count=3)),
    "q_unmatched": ("planted", "an int8 tensor that Cast reads", unmatched),
    "q_half_opset": ("d.q", "a float16 scale at opset 18", half_scales),
    "q_half_quantised": ("planted", "only its weight quantised", convolution(image=False)),
    "q_add": ("planted", "both inputs", join("Add", "quantised", "quantised")),
    "q_concat": ("planted", "inputs with scales 0.02, 0.05", join("Concat", "quantised", "quantised", other=0.05)),
    "q_resize": ("planted", "stays floating point", pooled(None)),
    "q_normalisation": ("last", "Softmax on a dequantised tensor", convolution(norm="Softmax", after=True)),
}


OTHERS: list[tuple[str, str, Case]] = [
    # rule, words of the detail, graph
    ("q_scale_value", "scale 0.0", quantised(scale=np.array(0.0, np.float32))),
    ("q_scale_value", "scale -1.0", quantised(scale=np.array(-1.0, np.float32))),
    ("q_concat", "1 of 2 inputs", join("Concat", "plain", "quantised")),
    ("q_resize", "two different scales", pooled(0.5)),
    ("q_weight_axis", "axis 0", convolution("ConvTranspose", axis=0)),
    ("cast_uint8", "Cast UINT8 -> INT32", cast(U8, I32)),
    (
        "training_mode",
        "BatchNormalization",
        one("BatchNormalization", inputs=("a",) * 4, extra={"a": np.ones(4, np.float32)}, training_mode=1),
    ),
    ("resize_type", "Resize of INT64", resize(image=(I64, ["batch", 4, 8, 8]), out=(I64, ["batch", 4, 16, 16]))),
    ("reduce_bool", "ReduceMin of BOOL", one("ReduceMin", image=(BOOL, ["batch", 4]), out=(BOOL, [1, 1]))),
    ("foreign_type", "a tensor of float8e5m2", cast(F32, TensorProto.FLOAT8E5M2)),
    ("opset", "opset 8", one("Relu", opset=8)),
    ("unsupported_op", "op CumProd", one("CumProd", inputs=("a",), extra={"a": np.array(1)}, opset=26)),
    ("unsupported_op", "op BitCast", one("BitCast", to=I32, out=(I32, ["batch", 4, 8, 8]), opset=26)),
    ("unsupported_op", "op SwiGLU", one("SwiGLU", inputs=("x",), opset=27)),
]


CLEAN: dict[str, Case] = {
    "relu": one("Relu"),
    "scalable resize": resize(coordinate_transformation_mode="align_corners"),
    "pooling": one("MaxPool", kernel_shape=[1, 1]),
    "uint8 in": cast(U8, F32),
    "uint8 out": cast(F32, U8),
    "int32 labels": cast(I64, I32),
    "quantised convolution": convolution(),
    "transposed": convolution("ConvTranspose", axis=1),
    "skip quantised": join("Add", "plain", "quantised"),
    "shared scale": join("Concat", "quantised", "quantised"),
    "pool in int8": pooled(0.02),
    "plugin": one("VssSegArgmax", domain="vss", out=(I32, ["batch", 16, 16])),
    "labels resized in float32": lambda: model(
        [
            helper.make_node("Cast", ["x"], ["f"], to=F32),
            helper.make_node("Resize", ["f", "", "s"], ["r"], mode="nearest"),
            helper.make_node("Cast", ["r"], ["y"], to=I32),
        ],
        {"s": np.array([1, 1, 2, 2], np.float32)},
        image=(I32, ["batch", 4, 8, 8]),
        out=(I32, ["batch", 4, 16, 16]),
    ),
    "scatter by a product": lambda: model(
        [
            helper.make_node("OneHot", ["i", "depth", "values"], ["places"]),
            helper.make_node("MatMul", ["u", "places"], ["sums"]),
            helper.make_node("Add", ["x", "sums"], ["y"]),
        ],
        {
            "i": np.array([3, 3, 5]),
            "depth": np.array([8]),
            "values": np.array([0, 1], np.float32),
            "u": np.ones((1, 3), np.float32),
        },
        image=(F32, ["batch", 8]),
        out=(F32, ["batch", 8]),
    ),
    "attention by products": lambda: model(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["x", "t"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["weights"]),
            helper.make_node("MatMul", ["weights", "x"], ["y"]),
        ]
    ),
    "largest TopK": top_k(3840),
    "uint8 passed on": one("Identity", image=(U8, ["batch", 4]), out=(U8, ["batch", 4])),
    "scatter": one(
        "ScatterElements",
        inputs=("i", "u"),
        extra={"i": np.zeros((1, 1, 1, 1), np.int64), "u": np.ones((1, 1, 1, 1), np.float32)},
        image=(F32, [1, 4, 8, 8]),
        out=(F32, [1, 4, 8, 8]),
    ),
    "window": lambda: model(
        [
            helper.make_node("HannWindow", ["size"], ["window"]),
            helper.make_node("Mul", ["x", "window"], ["y"]),
        ],
        {"size": np.array(8)},
    ),
}


def _detections() -> onnx.ModelProto:
    node = helper.make_node("NonMaxSuppression", ["x", "s", "m"], ["y"], name="planted")
    constants = {"s": np.zeros((1, 1, 4), np.float32), "m": np.array([1])}
    return model([node], constants, image=(F32, [1, 4, 4]), out=(I64, ["n", 3]))


NOT_BUILT: dict[str, Case] = {
    "Attention": attention,
    "DeformConv": one(
        "DeformConv",
        inputs=("w", "o"),
        extra={"w": np.ones((6, 4, 3, 3), np.float32), "o": np.zeros((1, 18, 6, 6), np.float32)},
        image=(F32, [1, 4, 8, 8]),
        out=(F32, [1, 6, 6, 6]),
        opset=22,
    ),
    "NonMaxSuppression": _detections,
    "NonZero": one("NonZero", image=(F32, [4, 8]), out=(I64, [2, "n"])),
    "RoiAlign": one(
        "RoiAlign",
        inputs=("r", "i"),
        extra={"r": np.zeros((1, 4), np.float32), "i": np.zeros(1, np.int64)},
        image=(F32, [1, 4, 8, 8]),
        out=(F32, [1, 4, 1, 1]),
    ),
}
"""Ops that the parser names as supported, and that no builder of RTX makes an engine of without a GPU."""
