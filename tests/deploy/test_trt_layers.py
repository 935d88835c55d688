"""The list of layers that a builder logs, read from a log of TensorRT for RTX 1.7.1 (shortened), and what is made of
it: types by convolution, and the checks of inputs, outputs and types."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.deploy.lint_graphs import convolution
from vss.deploy.backends.trt_layers import (
    check_ends,
    check_types,
    convolutions,
    nodes_of,
    parse_layers,
    summary,
    type_of,
)

CHANNELS = "Format: (NHWC) Channel major format"
ROWS = "Format: (Linear) Row major linear format"
LOG = f"""Layers:
Name: __mye2451_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, \
Metadata: 
Name: node_Conv_260_myl0_4, LayerType: correlation, Inputs: [ {{ Name: __mye3449getitem_3.1_23_myl0, Dimensions: \
[-1,16,128,160], Strides: [327680,1,2560,16], StrideOrder: [3,0,2,1], Datatype: Int8, {CHANNELS} }}], Constants: [ {{ \
Name: __mye6317dconst_myl0, Dimensions: [16,16,3,3], Strides: [144,1,48,16], StrideOrder: [3,0,2,1], Datatype: Int8, \
{CHANNELS} }}, {{ Name: __mye6322dconst_myl0, Dimensions: [1,16,1,1], Strides: [16,1,16,16], StrideOrder: [3,0,2,1], \
Datatype: Float, {CHANNELS} }}], Outputs: [ {{ Name: __myln_k_arg__bb1_24_myl0, Dimensions: [-1,16,128,160], Strides: \
[327680,1,2560,16], StrideOrder: [3,0,2,1], Datatype: Float, {CHANNELS} }}], TacticName: __myelin_CASK_STUB, StreamId: \
0, Metadata: [ONNX Layer: node_Conv_260][ONNX Layer: relu_DequantizeLinear][ONNX Layer: model.a.weight_DequantizeLinear]
Name: node_ConvTranspose_285_myl0_27, LayerType: deconv, Inputs: [ {{ Name: convolution.1_49_myl0, Dimensions: \
[-1,256,8,10], Strides: [20480,1,2560,256], StrideOrder: [3,0,2,1], Datatype: Half, {CHANNELS} }}], Constants: [ {{ \
Name: __mye16747_const_myl0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, {ROWS} }}], Outputs: [ \
{{ Name: __myln_k_arg__bb1_50_myl0, Dimensions: [-1,128,16,20], Strides: [40960,1,2560,128], StrideOrder: [3,0,2,1], \
Datatype: Half, {CHANNELS} }}], TacticName: __myelin_CASK_STUB, StreamId: 2, Metadata: [ONNX Layer: \
node_ConvTranspose_285]
A layer in the words of some other release
Name: __mye21242_myl0_18, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, EventId: \
4, Metadata:
Name: __myl_CastReshCast_myl0_35, LayerType: kgen, Inputs: [ {{ Name: __myln_k_arg__bb1_63_myl0, Dimensions: \
[-1,1,128,160], Strides: [20480,-1,160,1], StrideOrder: [2,3,1,0], Datatype: Int32, Format: (Arbitrary) Format with \
stride order = [2,3,1,0] }}], Constants: [], Outputs: [ {{ Name: labels, Dimensions: [-1,128,160], Strides: \
[20480,160,1], StrideOrder: [2,1,0], Datatype: Int32, {ROWS} }}], TacticName: , StreamId: 0, Metadata: [ONNX Layer: \
node_argmax]

I/O Tensors:
 Name: image, IOMode: Input, DataType: UInt8, Dimensions: [-1,128,160,3], Location: Device, IsShapeInferenceIO: false

Engine Metadata:
 Multi-Device: Disabled
"""


@pytest.fixture
def layers() -> list[dict[str, Any]]:
    return parse_layers(LOG)


def test_a_log_becomes_layers_in_the_keys_of_the_inspector(layers: list[dict[str, Any]]) -> None:
    assert [layer["LayerType"] for layer in layers] == [
        *("shape_call", "correlation", "deconv", "unknown", "wait", "kgen")
    ]
    conv = layers[1]
    assert conv["Name"] == "node_Conv_260_myl0_4" and conv["TacticName"] == "__myelin_CASK_STUB"
    assert conv["Inputs"] == [
        {
            "Name": "__mye3449getitem_3.1_23_myl0",
            "Dimensions": [-1, 16, 128, 160],
            "Format/Datatype": "Int8 (NHWC) Channel major format",
        }
    ]
    assert [each["Dimensions"] for each in conv["Constants"]] == [[16, 16, 3, 3], [1, 16, 1, 1]]
    assert conv["Outputs"][0]["Format/Datatype"].startswith("Float ")
    assert (layers[2]["StreamId"], layers[0]["Inputs"], layers[0]["Metadata"]) == (2, [], "")
    assert (layers[4]["StreamId"], layers[4]["EventId"], layers[4]["Metadata"]) == (1, 4, "")
    assert layers[5]["Inputs"][0]["Format/Datatype"].endswith("stride order = [2,3,1,0]")


def test_types_and_onnx_nodes_of_a_layer(layers: list[dict[str, Any]]) -> None:
    assert [type_of(layer) for layer in layers] == ["", "Int8", "Half", "", "", ""]
    assert nodes_of(layers[1]) == ["node_Conv_260", "relu_DequantizeLinear", "model.a.weight_DequantizeLinear"]
    assert summary(layers) == {"total": 6, "Half": 1, "Int8": 1, "other": 4}


def test_a_line_of_another_form_is_a_layer_that_says_nothing(layers: list[dict[str, Any]]) -> None:
    assert layers[3] == {"Name": "A layer in the words of some other release", "LayerType": "unknown"}
    assert (type_of(layers[3]), nodes_of(layers[3])) == ("", [])


@pytest.mark.parametrize("text", ["", "Layers:\n", "Layers:\n\nEngine Metadata:\n Multi-Device: Disabled\n"])
def test_a_log_without_layers(text: str) -> None:
    assert parse_layers(text) == [] and summary([]) == {"total": 0}


# What the file asks of its convolutions


def plain(kind: str) -> onnx.ModelProto:
    """conv(image), its weight as float32, float16, or quantised in float32 ("weight") with the image or without."""
    if kind in ("int8", "weight"):
        return convolution(image=kind == "int8")()
    dtype = {"fp32": np.float32, "fp16": np.float16}[kind]
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="planted")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 8, 8]) for name in "xy"]
    graph = helper.make_graph(
        [node], "g", value[:1], value[1:], [numpy_helper.from_array(np.ones((4, 4, 1, 1), dtype), "w")]
    )
    return helper.make_model(graph)


def engine(runs: str, kind: str = "correlation", node: str = "planted") -> list[dict[str, Any]]:
    side = [{"Name": "t", "Dimensions": [1], "Format/Datatype": f"{runs} (Linear)"}]
    made = {"Name": "l", "Inputs": side, "Outputs": [], "Metadata": f"[ONNX Layer: {node}]"}
    cast = {"Name": "k", "LayerType": "kgen", "Inputs": [], "Metadata": "[ONNX Layer: planted]"}  # its scales
    return [cast, {"LayerType": kind, **made}]


@pytest.mark.parametrize(
    ("file", "runs", "passed"),
    [
        ("fp32", "Float", True),
        ("fp32", "Half", False),
        ("fp16", "Half", True),
        ("fp16", "Float", False),
        ("int8", "Int8", True),
        ("int8", "Half", False),
        ("int8", "Float", False),
        ("weight", "Float", True),
    ],
)
def test_a_convolution_runs_in_the_type_of_its_file_or_the_check_fails(file: str, runs: str, passed: bool) -> None:
    found = convolutions(plain(file), engine(runs))
    asked = {"fp32": "Float", "fp16": "Half", "int8": "Int8", "weight": "Float"}[file]
    assert found == {"planted": {"op": "Conv", "asked": asked, "runs": runs}}
    check = check_types(found, ())
    assert check.passed is passed
    assert (f"not as asked: planted ({asked} asked, {runs} runs)" in check.sentence) is not passed


def test_what_a_target_runs_in_floating_point_is_named_and_passes() -> None:
    found = convolutions(convolution("ConvTranspose", axis=1)(), engine("Half", "deconv"))
    check = check_types(found, ("ConvTranspose",))
    assert check.passed and "1 ConvTranspose are quantised in the file and run in floating point" in check.sentence
    assert not check_types(found, ()).passed


def test_a_convolution_that_no_layer_names_is_counted() -> None:
    found = convolutions(plain("fp16"), engine("Half"))
    lost = {"lost": {"op": "Conv", "asked": "Half", "runs": ""}}
    check = check_types(found | lost, ())
    assert check.passed and check.sentence == "1 of 2 convolutions run in Half, 1 are in no layer by name"
    check = check_types(lost, ())  # such as a log in another form
    assert not check.passed and check.sentence == "1 are in no layer by name"
    none = check_types({}, ())
    assert none.passed and none.sentence == "the file has no convolution, and no other layer is judged"


def chain(*, weight: int = 1, cast: int = 0, between: str = "", names: tuple[str, ...] = ("c",)) -> Any:
    """x -> between -> Conv -> ...; the weight is of one type and cast to another."""
    nodes, initializers, last = [], [], "x"
    for index, name in enumerate(names):
        held = f"w{index}"
        array = np.zeros((4, 4, 1, 1), helper.tensor_dtype_to_np_dtype(weight))
        initializers.append(numpy_helper.from_array(array, held))
        if cast:
            nodes.append(helper.make_node("Cast", [held], [f"{held}c"], to=cast))
        nodes.append(helper.make_node("Conv", [last, f"{held}c" if cast else held], [f"y{index}"], name=name))
        last = f"y{index}"
    ends = [helper.make_tensor_value_info(end, cast or weight, ["n", 4, 8, 8]) for end in ("x", last)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def layer(name: str, kind: str) -> dict[str, Any]:
    side = [{"Name": "t", "Dimensions": [1], "Format/Datatype": f"{kind} Row major"}]
    return {"Name": "k", "LayerType": "correlation", "Inputs": side, "Metadata": f"[ONNX Layer: {name}]"}


@pytest.mark.parametrize(
    ("model", "layers", "sentence"),
    [
        (chain(weight=10, cast=1), [layer("c", "Float")], "1 of 1 convolutions run in Float"),
        (chain(weight=1, cast=10), [layer("c", "Half")], "1 of 1 convolutions run in Half"),
        (chain(weight=16), [layer("c", "BFloat16")], "1 of 1 convolutions run in BFloat16"),
        (
            chain(names=("", "")),
            [layer("node_of_y0", "Float"), layer("node_of_y1", "Float")],
            "2 of 2 convolutions run in Float",
        ),
        (chain(names=("c", "c")), [layer("c", "Float"), layer("c", "Half")], "2 are not judged"),
        (chain(names=("a][b",)), [layer("a][b", "Float")], "1 of 1 convolutions run in Float"),
        (chain(names=("a\nb",)), [layer("other", "Float")], "1 are not judged"),
    ],
)
def test_files_of_other_exporters_are_neither_failed_nor_passed_wrongly(model: Any, layers: Any, sentence: str) -> None:
    check = check_types(convolutions(model, layers), ())
    assert check.passed and check.sentence == sentence


def test_inputs_and_outputs_are_held_against_the_file() -> None:
    model = plain("fp32")
    good = {"x": {"dtype": "FLOAT", "shape": [-1, 4, 8, 8]}}
    ends = {"inputs": good, "outputs": {"y": dict(good["x"])}}
    assert check_ends(model, ends).passed
    for changed, words in (
        ({"dtype": "HALF", "shape": [-1, 4, 8, 8]}, "x is HALF and was FLOAT"),
        ({"dtype": "FLOAT", "shape": [1, 4, 8, 8]}, "x is [1, 4, 8, 8] and was [-1, 4, 8, 8] (-1 is free)"),
    ):
        check = check_ends(model, ends | {"inputs": {"x": changed}})
        assert not check.passed and check.sentence == words
    check = check_ends(model, ends | {"outputs": {"z": good["x"]}})
    assert not check.passed and check.sentence == "outputs are ['z'] and were ['y']"
