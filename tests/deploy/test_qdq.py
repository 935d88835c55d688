"""vss.deploy.quantize.qdq: which edges carry Q/DQ, and what the inserted ones compute, against numpy by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.deploy.nets import conv_graph, fake_quantise
from vss.core.errors import VssError
from vss.deploy.quantize.layers import Net
from vss.deploy.quantize.qdq import insert, observed, place, tied

SOURCE = Path("graph.onnx")


def ranges(net: Net) -> dict[str, float]:
    return {name: 1.0 + index / 4 for index, name in enumerate(observed(net))}


def run(model: onnx.ModelProto, image: np.ndarray, names: list[str]) -> list[np.ndarray]:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "logits")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(copy.SerializeToString(), options).run(names, {"image": image})


def before(model: onnx.ModelProto, tensor: str) -> tuple[str, float] | None:
    """(tensor in front of the Q/DQ pair that makes this one, scale), or None where there is no pair."""
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    node = makers.get(tensor)
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in makers:
        return None
    return makers[node.input[0]].input[0], float(constants[node.input[1]])


def test_edges_of_a_residual_block_a_pool_and_a_concat() -> None:
    placement = place(Net(conv_graph()))
    assert placement.layers == ["stem", "main.0", "main.1", "project", "down", "mix"]
    assert placement.skips == {"n_add": 1}
    assert placement.edges == {
        ("n_stem", 0), ("n_main.0", 0), ("n_main.1", 0), ("n_project", 0), ("n_down", 0), ("n_mix", 0),
        ("n_add", 1), ("n_cat", 0), ("n_cat", 1), ("n_pool", 0),
    }  # fmt: skip
    assert placement.ties == [{"res", "up", "cat", "pooled"}]
    assert tied(placement, {"res": 2.0, "up": 3.0, "cat": 2.5, "pooled": 1.0, "m0r": 9.0}) == {
        "res": 3.0, "up": 3.0, "cat": 3.0, "pooled": 3.0, "m0r": 9.0,
    }  # fmt: skip


def test_what_stays_in_floating_point_takes_its_neighbours_along() -> None:
    net = Net(conv_graph())
    without = place(net, ["mix"])
    assert ("n_cat", 0) not in without.edges and without.ties == [] and ("n_pool", 0) not in without.edges
    assert place(net, ["main.1"]).skips == {"n_add": 0}  # the projection is the branch that fuses now
    assert place(net, ["main.1", "project"]).skips == {}
    assert "stem" not in place(net, first=False).layers and "head" in place(net, last=True).layers
    with pytest.raises(VssError, match="no layer is left for INT8: 7 layers"):
        place(net, [layer.name for layer in net.layers])


def test_inserted_pairs_stand_at_the_edges_and_nowhere_else() -> None:
    net = Net(conv_graph())
    placement, values = place(net), ranges(net)
    model = insert(net, placement, values, SOURCE)
    onnx.checker.check_model(model, full_check=True)
    original = {node.name: list(node.input) for node in net.nodes}
    shared = tied(placement, values)
    for node in model.graph.node:
        if node.name not in original:
            continue
        for index, name in enumerate(node.input):
            pair = before(model, name)
            tensor = original[node.name][index]
            if (node.name, index) in placement.edges:
                assert pair == (tensor, pytest.approx(shared[tensor] / 127, rel=1e-6)), (node.name, index)
            else:
                assert pair is None
    concat = next(node for node in model.graph.node if node.name == "n_cat")
    assert len({before(model, name)[1] for name in concat.input}) == 1


def test_int8_layer_computes_what_rounding_by_hand_gives() -> None:
    model, net = conv_graph(), Net(conv_graph())
    image = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    stem = run(model, image, ["stem"])[0]
    values = dict.fromkeys(observed(net), 1.0) | {"stem": float(np.abs(stem).max()), "image": 3.0}
    quantised = insert(net, place(net, [layer.name for layer in net.layers if layer.name != "project"]), values, SOURCE)
    weight = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "model.project.weight"))
    rounded = fake_quantise(weight, np.abs(weight).max(axis=(1, 2, 3), keepdims=True))
    expected = np.einsum("oi,nihw->nohw", rounded[:, :, 0, 0], fake_quantise(stem, values["stem"]))
    found = run(quantised, image, ["p"])[0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    stored = {t.name: t.data_type for t in quantised.graph.initializer}
    assert stored["model.project.weight_quantized"] == onnx.TensorProto.INT8
    assert stored["model.main.0.weight"] == onnx.TensorProto.FLOAT


def test_every_tensor_that_a_placement_needs_is_observed() -> None:
    net = Net(conv_graph())
    names = observed(net)
    assert set(names) == {"image", "stem", "m0r", "m1", "p", "res", "pooled", "up", "cat", "xr"}
    missing: dict[str, Any] = ranges(net)
    del missing["m0r"]
    with pytest.raises(VssError, match=r"say nothing of tensor 'm0r' of graph\.onnx"):
        insert(net, place(net), missing, SOURCE)
