"""vss.deploy.surgeon: each pass on a hand-made graph; results are compared in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, helper

from vss.core.errors import VssError
from vss.deploy import surgeon


def resize_model(source: tuple[int, int], target: tuple[int, int], mode: str = "half_pixel") -> onnx.ModelProto:
    """What the exporter writes for interpolate() with a dynamic batch: sizes = Concat(Shape(x)[:2], target)."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, *source])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 2, *target])
    nodes = [
        helper.make_node("Shape", ["image"], ["head"], start=0, end=2),
        helper.make_node("Concat", ["head", "target"], ["sizes"], axis=0),
        helper.make_node(
            "Resize", ["image", "", "", "sizes"], ["out"], mode="linear", coordinate_transformation_mode=mode
        ),
    ]
    constant = helper.make_tensor("target", TensorProto.INT64, [2], list(target))
    graph = helper.make_graph(nodes, "g", [image], [out], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": x})[0]


@pytest.mark.parametrize("mode", ["half_pixel", "align_corners"])
@pytest.mark.parametrize(("source", "target"), [((8, 12), (32, 48)), ((8, 12), (12, 15)), ((16, 16), (8, 4))])
def test_exact_ratio_becomes_constant_scales(source: tuple, target: tuple, mode: str) -> None:
    model = resize_model(source, target, mode)
    cleaned, report = surgeon.clean(model, {})
    assert report == {
        "nodes_before": 3,
        "nodes_after": 1,
        "passes": {"identity_as_strided": 0, "resize_by_scales": 1, "uint8_through_float": 0, "shape_of_float": 0},
    }
    assert [node.op_type for node in cleaned.graph.node] == ["Resize"]
    for batch in (1, 3):
        x = np.random.default_rng(0).normal(size=(batch, 2, *source)).astype(np.float32)
        assert np.array_equal(run(cleaned, x), run(model, x))
        assert run(cleaned, x).shape == (batch, 2, *target)


def test_inexact_ratio_keeps_its_sizes() -> None:
    model = resize_model((23, 11), (45, 30))
    cleaned, report = surgeon.clean(model, {})
    assert report["passes"]["resize_by_scales"] == 0
    x = np.random.default_rng(0).normal(size=(2, 2, 23, 11)).astype(np.float32)
    assert np.array_equal(run(cleaned, x), run(model, x))


def test_every_power_of_two_and_common_ratio_keeps_the_exact_size() -> None:
    for have in range(1, 70):
        for want in range(1, 140):
            scales = surgeon._scales([1, 1, have, have], [1, 1, want, want])
            if scales is not None:
                assert np.floor(np.float32(have) * np.float32(scales[0])) == want
                assert scales[0] * have == want
            else:
                assert (want / have) * 2**23 % 1 != 0


def cast_model(source: int) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("image", source, ["batch", 4])
    out = helper.make_tensor_value_info("out", TensorProto.UINT8, ["batch", 4])
    graph = helper.make_graph([helper.make_node("Cast", ["image"], ["out"], to=TensorProto.UINT8)], "g", [image], [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("source", "dtype"), [(TensorProto.INT64, np.int64), (TensorProto.INT32, np.int32)])
def test_integers_reach_uint8_by_way_of_float(source: int, dtype: type) -> None:
    cleaned, report = surgeon.clean(cast_model(source), {})
    assert report["passes"]["uint8_through_float"] == 1
    assert [node.attribute[0].i for node in cleaned.graph.node] == [TensorProto.FLOAT, TensorProto.UINT8]
    x = np.array([[0, 1, 200, 255]], dtype)
    assert run(cleaned, x).tolist() == x.tolist()


def test_float_to_uint8_is_left_alone() -> None:
    _, report = surgeon.clean(cast_model(TensorProto.FLOAT), {})
    assert report["passes"]["uint8_through_float"] == 0
    graph = gs.import_onnx(surgeon.clean(cast_model(TensorProto.INT64), {})[0])
    assert surgeon.uint8_through_float(graph) == 0  # a second time changes nothing


@pytest.mark.parametrize("casts", [0, 1])
def test_shapes_are_read_of_floats(casts: int) -> None:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 2, 3])
    outs = [helper.make_tensor_value_info("size", TensorProto.INT64, [3])]
    nodes = [helper.make_node("Shape", ["image"], ["size"])]
    if casts:
        nodes.append(helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT))
        outs.append(helper.make_tensor_value_info("floats", TensorProto.FLOAT, ["batch", 2, 3]))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], outs), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    cleaned, report = surgeon.clean(model, {})
    assert report["passes"]["shape_of_float"] == 1
    assert [node.op_type for node in cleaned.graph.node] == ["Cast", "Shape"]
    assert run(cleaned, np.zeros((5, 2, 3), np.uint8)).tolist() == [5, 2, 3]


def test_clean_folds_drops_and_writes_metadata() -> None:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 2])
    two = helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0])
    nodes = [
        helper.make_node("Mul", ["two", "two"], ["four"], doc_string='File "/home/somebody/x.py"'),
        helper.make_node("Relu", ["image"], ["unused"]),
        helper.make_node("Mul", ["image", "four"], ["out"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], [out], [two]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    model.metadata_props.add(key="old", value="1")
    cleaned, report = surgeon.clean(model, {"vss.model": "unet"})
    assert (report["nodes_before"], report["nodes_after"]) == (3, 1)
    assert {each.key: each.value for each in cleaned.metadata_props} == {"vss.model": "unet"}
    assert b"somebody" not in cleaned.SerializeToString()
    assert cleaned.ir_version == 10
    assert run(cleaned, np.array([[1.0, -3.0]], np.float32)).tolist() == [[4.0, -12.0]]


def test_check_refuses_a_batch_that_came_out_fixed() -> None:
    model = resize_model((4, 4), (8, 8))
    wanted = {"image": ("float32", ("batch", 2, 4, 4))}, {"out": ("float32", ("batch", 2, 8, 8))}
    surgeon.check(model, *wanted)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(VssError, match=r"declares {'image': \('float32', \(2, 2, 4, 4\)\)}; expected .*'batch'"):
        surgeon.check(model, *wanted)


def test_check_refuses_what_is_no_valid_onnx() -> None:
    model = resize_model((4, 4), (8, 8))
    model.graph.node[2].op_type = "Rezise"
    with pytest.raises(VssError, match="not valid ONNX"):
        surgeon.check(model, {}, {})


def strided_model(name: str, channels: int, indexed: int) -> onnx.ModelProto:
    """What the exporter writes for adaptive_avg_pool2d(x, 1): a mean, flattened and gathered again."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", channels, 4, 6])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", indexed, 1, 1])
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=1),
        helper.make_node("Reshape", ["mean", "flat"], ["all"]),
        helper.make_node("Gather", ["all", "index"], ["view"], name=name),
        helper.make_node("Relu", ["view"], ["out"]),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
        helper.make_tensor("flat", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("index", TensorProto.INT64, [1, indexed, 1, 1], list(range(indexed))),
    ]
    graph = helper.make_graph(nodes, "g", [image], [out], constants)
    shapes = [
        helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", channels, 1, 1]),
        helper.make_tensor_value_info("view", TensorProto.FLOAT, [1, indexed, 1, 1]),
    ]
    graph.value_info.extend(shapes)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_view_of_a_global_mean_is_dropped() -> None:
    model = strided_model("node_as_strided", 3, 3)
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 6)).astype(np.float32)
    wanted = run(model, x)
    cleaned, report = surgeon.clean(model, {})
    assert report["passes"]["identity_as_strided"] == 1
    assert [node.op_type for node in cleaned.graph.node] == ["ReduceMean", "Relu"]
    assert np.array_equal(run(cleaned, x), wanted)


@pytest.mark.parametrize(("name", "indexed"), [("node_gather", 3), ("node_as_strided", 2)])
def test_another_gather_stays(name: str, indexed: int) -> None:
    cleaned, report = surgeon.clean(strided_model(name, 3, indexed), {})
    assert report["passes"]["identity_as_strided"] == 0
    assert "Gather" in [node.op_type for node in cleaned.graph.node]
