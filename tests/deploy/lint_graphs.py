"""Small graphs with and without what TensorRT refuses, for the tests of the lint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F32, F16, U8, I8, I32, I64 = (getattr(TensorProto, n) for n in ("FLOAT", "FLOAT16", "UINT8", "INT8", "INT32", "INT64"))
Case = Callable[[], onnx.ModelProto]


def value(name: str, dtype: int, shape: list[int | str]) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: list[Any],
    constants: dict[str, np.ndarray] | None = None,
    *,
    image: tuple[int, list[int | str]] = (F32, ["batch", 4, 8, 8]),
    out: tuple[int, list[int | str]] = (F32, ["batch", 4, 8, 8]),
    opset: int = 20,
    domains: tuple[str, ...] = (),
    functions: tuple[Any, ...] = (),
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", [value("x", *image)], [value("y", *out)], initializers)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def one(op: str, *, extra: dict[str, np.ndarray] | None = None, inputs: tuple[str, ...] = (), **attributes: Any) -> Any:
    """A graph of one node, y = op(x, further inputs)."""
    where = {key: attributes.pop(key) for key in ("image", "out", "opset") if key in attributes}
    domain = attributes.pop("domain", "")
    outputs = attributes.pop("outputs", ["y"])
    node = helper.make_node(op, ["x", *inputs], outputs, name="planted", domain=domain, **attributes)
    return lambda: model([node], extra, domains=(domain,) if domain else (), **where)


def resize(**attributes: Any) -> Case:
    scales = np.array([1, 1, 2, 2], np.float32)
    own = {"mode": "linear", "out": (F32, ["batch", 4, 16, 16])}
    return one("Resize", extra={"s": scales}, inputs=("", "s"), **own | attributes)


def cast(source: int, target: int) -> Case:
    return one("Cast", image=(source, ["batch", 4]), out=(target, ["batch", 4]), to=target)


SCALE, ZERO = np.array(0.02, np.float32), np.array(0, np.int8)


def pair(name: str, source: str, *, scale: str = "scale", zero: str = "zero") -> list[Any]:
    """Quantise and dequantise `source` into NAME."""
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [f"{name}_q"], name=f"{name}.q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [name], name=f"{name}.dq"),
    ]


def quantised(**constants: np.ndarray) -> Case:
    """x -> Q -> DQ -> Relu -> y with other constants."""
    return lambda: model(
        [*pair("d", "x"), helper.make_node("Relu", ["d"], ["y"])], {"scale": SCALE, "zero": ZERO} | constants
    )


def convolution(
    op: str = "Conv",
    *,
    axis: int = 0,
    count: int = 4,
    bias: bool = False,
    image: bool = True,
    norm: str = "",
    after: bool = False,
) -> Case:
    """A convolution with an int8 weight, as TensorRT wants it unless an argument says otherwise."""

    def make() -> onnx.ModelProto:
        constants = {"scale": SCALE, "zero": ZERO, "w_q": np.ones((4, 4, 1, 1), np.int8)}
        constants |= {"ws": np.full(count, 0.1, np.float32), "wz": np.zeros(count, np.int8)}
        nodes = [*pair("d", "x")] if image else []
        nodes += [helper.make_node("DequantizeLinear", ["w_q", "ws", "wz"], ["w"], name="w.dq", axis=axis)]
        inputs = ["d" if image else "x", "w"]
        if bias:
            constants |= {"b_q": np.ones(4, np.int32), "bs": np.array(0.01, np.float32)}
            nodes += [helper.make_node("DequantizeLinear", ["b_q", "bs"], ["b"], name="bias.dq")]
            inputs.append("b")
        nodes += [helper.make_node(op, inputs, ["c"], name="planted")]
        last = "c"
        if after:
            nodes += pair("e", "c")
            last = "e"
        nodes += [helper.make_node(norm or "Relu", [last], ["y"], name="last")]
        return model(nodes, constants)

    return make


def join(op: str, first: str, second: str, *, other: float = 0.02) -> Case:
    """y = op of two branches of x; a branch is "plain" or "quantised"."""

    def make() -> onnx.ModelProto:
        nodes, names = [], []
        for index, kind in enumerate((first, second)):
            nodes.append(helper.make_node("Relu", ["x"], [f"r{index}"]))
            if kind == "quantised":
                nodes += pair(f"d{index}", f"r{index}", scale=f"scale{index}")
            names.append(f"d{index}" if kind == "quantised" else f"r{index}")
        attributes = {"axis": 1} if op == "Concat" else {}
        nodes.append(helper.make_node(op, names, ["y"], name="planted", **attributes))
        scales = {"scale0": SCALE, "scale1": np.array(other, np.float32), "zero": ZERO}
        return model(nodes, scales, out=(F32, ["batch", 8 if op == "Concat" else 4, 8, 8]))

    return make


def pooled(after: float | None) -> Case:
    """Q, DQ, MaxPool, and then Q and DQ with another scale or nothing."""

    def make() -> onnx.ModelProto:
        nodes = [*pair("d", "x"), helper.make_node("MaxPool", ["d"], ["p"], name="planted", kernel_shape=[1, 1])]
        nodes += pair("e", "p", scale="after") if after else []
        nodes += [helper.make_node("Relu", ["e" if after else "p"], ["y"])]
        return model(nodes, {"scale": SCALE, "zero": ZERO, "after": np.array(after or 1.0, np.float32)})

    return make


def computed_scale() -> onnx.ModelProto:
    nodes = [helper.make_node("ReduceMax", ["x"], ["scale"], keepdims=0), *pair("d", "x")]
    return model([*nodes, helper.make_node("Relu", ["d"], ["y"])], {"zero": ZERO})


def unmatched() -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="planted"),
        helper.make_node("Cast", ["q"], ["y"], to=F32),
    ]
    return model(nodes, {"scale": SCALE, "zero": ZERO})


def half_scales() -> onnx.ModelProto:
    nodes = [*pair("d", "x"), helper.make_node("Relu", ["d"], ["y"])]
    made = model(
        nodes, {"scale": SCALE.astype(np.float16), "zero": ZERO}, image=(F16, ["b", 4, 8, 8]), out=(F16, ["b", 4, 8, 8])
    )
    made.opset_import[0].version = 18
    return made


def clash() -> onnx.ModelProto:
    return model([helper.make_node("Relu", ["x"], ["y"], name="planted", domain="mine")], domains=("mine",))


def nine() -> onnx.ModelProto:
    shape = np.array([-1, *([2] * 8)], np.int64)
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["deep"]),
        helper.make_node("ReduceMax", ["deep", "axes"], ["y"], keepdims=0),
    ]
    axes = np.arange(4, 9)
    return model(nodes, {"shape": shape, "axes": axes}, out=(F32, ["batch", 2, 2, 2]))
