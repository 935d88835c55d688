"""Hand-written ONNX graphs for what exported networks do not show, and numbers for quantisation by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT


def conv_graph(*, seed: int = 0) -> onnx.ModelProto:
    """image (N, 3, 16, 16) -> a residual block with a projection, a pool, a concat, a head.

    stem; main1, main2 beside project; Add; Relu; MaxPool and again the same tensor into Concat behind a Resize; head.
    """
    rng = np.random.default_rng(seed)
    weights = {
        name: (rng.standard_normal(shape) * 0.3).astype(np.float32)
        for name, shape in {
            "model.stem.weight": (4, 3, 3, 3), "model.main.0.weight": (4, 4, 3, 3), "model.main.1.weight": (4, 4, 3, 3),
            "model.project.weight": (4, 4, 1, 1), "model.down.weight": (4, 4, 3, 3), "model.mix.weight": (6, 8, 1, 1),
            "model.head.weight": (2, 6, 1, 1),
        }.items()
    }  # fmt: skip

    def conv(name: str, source: str, out: str, pad: int) -> Any:
        return helper.make_node("Conv", [source, f"model.{name}.weight"], [out], f"n_{name}", pads=[pad] * 4)

    nodes = [
        conv("stem", "image", "s", 1), helper.make_node("Relu", ["s"], ["stem"], "n_stem_relu"),
        conv("main.0", "stem", "m0", 1), helper.make_node("Relu", ["m0"], ["m0r"], "n_main_relu"),
        conv("main.1", "m0r", "m1", 1), conv("project", "stem", "p", 0),
        helper.make_node("Add", ["m1", "p"], ["sum"], "n_add"), helper.make_node("Relu", ["sum"], ["res"], "n_res"),
        helper.make_node("MaxPool", ["res"], ["pooled"], "n_pool", kernel_shape=[2, 2], strides=[2, 2]),
        conv("down", "pooled", "d", 1), helper.make_node("Relu", ["d"], ["dr"], "n_down_relu"),
        helper.make_node("Resize", ["dr", "", "scales"], ["up"], "n_up", mode="linear"),
        helper.make_node("Concat", ["res", "up"], ["cat"], "n_cat", axis=1),
        conv("mix", "cat", "x", 0), helper.make_node("Relu", ["x"], ["xr"], "n_mix_relu"),
        conv("head", "xr", "logits", 0),
    ]  # fmt: skip
    constants = weights | {"scales": np.array([1, 1, 2, 2], np.float32)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 2, 16, 16])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def fake_quantise(values: np.ndarray, limit: float | np.ndarray) -> np.ndarray:
    """Symmetric INT8 and back, in float64: round half to even, -127..127 or -128..127 alike inside the range."""
    scale = np.asarray(limit, np.float64) / 127
    return np.clip(np.rint(values.astype(np.float64) / scale), -128, 127) * scale
