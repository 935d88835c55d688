"""vss.deploy.quantize.layers: what is converted, what stays, and that what stays is never rounded on its way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from tests.deploy.nets import FLOAT, conv_graph
from tests.prune.nets import few_blocks
from vss.core.errors import NotFinite, VssError
from vss.deploy import export
from vss.deploy.quantize.layers import Net, kept_nodes, read_onnx, to_fp16
from vss.deploy.quantize.precision import Precision, export_as
from vss.models import build

HALF = onnx.TensorProto.FLOAT16


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def norm_graph() -> onnx.ModelProto:
    """Two convolutions with x - mean over the root of the variance between them, written out; values around 1000."""
    rng = np.random.default_rng(0)
    one = (rng.standard_normal((4, 3, 1, 1)) * 500).astype(np.float32)
    constants = {"a.weight": one, "b.weight": rng.standard_normal((2, 4, 1, 1)).astype(np.float32),
                 "axes": np.array([2, 3]), "eps": np.array(1e-3, np.float32)}  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "a.weight"], ["x"], "n_a"),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], "n_mean", keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["d"], "n_sub"),
        helper.make_node("Mul", ["d", "d"], ["dd"], "n_square"),
        helper.make_node("ReduceMean", ["dd", "axes"], ["var"], "n_var", keepdims=1),
        helper.make_node("Add", ["var", "eps"], ["ve"], "n_eps"), helper.make_node("Sqrt", ["ve"], ["std"], "n_std"),
        helper.make_node("Div", ["d", "std"], ["y"], "n_div"), helper.make_node("Relu", ["y"], ["r"], "n_relu"),
        helper.make_node("Conv", ["r", "b.weight"], ["logits"], "n_b"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 2, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_layers_are_float16_and_the_keep_list_is_not() -> None:
    model = conv_graph()
    net = Net(model)
    converted = to_fp16(model, kept_nodes(net, ["main.1"]))
    onnx.checker.check_model(converted, full_check=True)
    found = types(converted)
    assert found["model.stem.weight"] == found["s"] == found["cat"] == HALF
    assert found["model.main.1.weight"] == FLOAT and found["logits"] == FLOAT
    up = next(node for node in converted.graph.node if node.name == "n_up")
    assert found[up.input[0]] == found[up.output[0]] == FLOAT
    assert model == conv_graph()


def test_a_normalisation_written_out_stays_float32_as_a_whole() -> None:
    model = norm_graph()
    kept = kept_nodes(Net(model))
    assert kept == {"n_mean", "n_sub", "n_square", "n_var", "n_eps", "n_std", "n_div"}
    converted = to_fp16(model, kept)
    onnx.checker.check_model(converted, full_check=True)
    casts = [node for node in converted.graph.node if node.op_type == "Cast"]
    assert len(casts) == 4  # image in, into the normalisation, out of it, logits out
    image = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected, found = (
        onnxruntime.InferenceSession(each.SerializeToString()).run(None, {"image": image})[0]
        for each in (model, converted)
    )
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    found_types = types(converted)
    between = {name for node in converted.graph.node if node.name in kept for name in node.output}
    assert len(between) == 7 and {found_types[name] for name in between} == {FLOAT}


def test_an_exported_file_keeps_its_ends(exported: SimpleNamespace) -> None:
    model = read_onnx(exported.labels[0])
    converted = to_fp16(model, kept_nodes(Net(model)))
    onnx.checker.check_model(converted, full_check=True)
    assert [v.type.tensor_type.elem_type for v in (*converted.graph.input, *converted.graph.output)] == [
        onnx.TensorProto.UINT8, onnx.TensorProto.UINT8,
    ]  # fmt: skip
    found = types(converted)
    head = next(node for node in converted.graph.node if node.op_type == "ArgMax")
    assert found[head.input[0]] == FLOAT
    assert sum(t.data_type == HALF for t in converted.graph.initializer) >= 6
    assert len(converted.SerializeToString()) < len(model.SerializeToString())


@pytest.mark.parametrize("name", ["segdecnet", "lraspp_mobilenet_v3_large"])
def test_networks_with_norms_and_gates(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"widths": [4, 4, 4, 4, 16]} if name == "segdecnet" else {}
    with few_blocks():
        model = build(name, 1 if name == "segdecnet" else 3, **options).eval()
    export(model, tmp_path / "x.onnx", size=(64, 128), parity_batches=[1])
    source = read_onnx(tmp_path / "x.onnx")
    converted = to_fp16(source, kept_nodes(Net(source)))
    onnx.checker.check_model(converted, full_check=True)
    x = {"image": np.random.default_rng(0).standard_normal((2, 3, 64, 128)).astype(np.float32)}
    expected, found = (onnxruntime.InferenceSession(m.SerializeToString()).run(None, x) for m in (source, converted))
    for a, b in zip(expected, found, strict=True):
        assert np.abs(a - b).max() < 2e-2 * np.abs(a).max()


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(VssError, match=r"unknown layer 'stemm'. Did you mean 'stem'"):
        kept_nodes(Net(conv_graph()), ["stemm"])


def test_values_beyond_float16_are_refused_by_layer(tmp_path: Path) -> None:
    """On the CPU the file itself would pass: onnxruntime computes it in float32."""
    torch.manual_seed(0)
    net = build("unet", 5, width=4, depth=1).eval()
    convs = {
        name: each for name, each in net.named_modules() if isinstance(each, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    }
    first, second, *_, last = convs
    with torch.no_grad():
        for name, factor in ((first, 1e3), (second, 1e3), (last, 1e-3)):
            convs[name].weight *= factor
    with pytest.raises(NotFinite, match=rf"layer {second} gives values of .* and float16 ends at 65504"):
        export_as(net, tmp_path / "half.onnx", Precision("fp16"), size=(16, 16), preprocess=None, labels=True)
    assert not list(tmp_path.iterdir())
