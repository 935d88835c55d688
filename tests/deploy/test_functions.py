"""vss.deploy.surgeon: plugin nodes run in onnxruntime by their bodies, exactly as torch and as the native rewrite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from vss import models
from vss.core.errors import VssError
from vss.data import Preprocess
from vss.deploy import export
from vss.deploy.backends.trt import without_bodies
from vss.deploy.lint import PLUGINS, lint
from vss.deploy.surgeon import BODIES, add_bodies
from vss.ops import onnx_nodes

KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int32: TensorProto.INT32}
SIZES = [(8, 12), (7, 9), (2, 2), (3, 2), (5, 16)]


def run(name: str, inputs: dict[str, Tensor], outputs: dict[str, torch.dtype], **attributes: int) -> list[Tensor]:
    """One plugin node with its body, in onnxruntime; every dimension is free."""
    node = helper.make_node(name, list(inputs), list(outputs), domain="vss", **attributes)
    values = [
        helper.make_tensor_value_info(key, KINDS[x.dtype], [f"{key}{i}" for i in range(x.ndim)])
        for key, x in inputs.items()
    ]
    ends = [helper.make_tensor_value_info(key, KINDS[dtype], None) for key, dtype in outputs.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("vss", 1)]
    model = helper.make_model(helper.make_graph([node], "g", values, ends), opset_imports=opsets, ir_version=10)
    assert add_bodies(model) == [name]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [torch.from_numpy(y) for y in session.run(None, {key: x.numpy() for key, x in inputs.items()})]


def maps(size: tuple[int, int], dtype: torch.dtype = torch.float32, *, ties: bool = False) -> Tensor:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)))
    return (x.mul(2).round() if ties else x).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pooling_and_unpooling_are_those_of_torch(size: tuple[int, int], ties: bool, dtype: torch.dtype) -> None:
    x = maps(size, dtype, ties=ties)
    y, places = run("VssMaxPool", {"x": x}, {"y": dtype, "places": torch.int32}, kernel=2)
    expected, indices = F.max_pool2d(x.float(), 2, stride=2, return_indices=True)
    assert torch.equal(y.float(), expected) and torch.equal(places.long(), indices)
    extra = {"extra_h": size[0] % 2, "extra_w": size[1] % 2}
    (back,) = run("VssMaxUnpool", {"x": y, "places": places}, {"back": dtype}, **extra)
    assert back.dtype == dtype
    assert torch.equal(back.float(), F.max_unpool2d(expected, indices, 2, stride=2, output_size=list(size)))


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(
    ("source", "target"), [((5, 7), (20, 28)), ((8, 12), (8, 12)), ((9, 5), (31, 17)), ((6, 6), (4, 3))]
)
@pytest.mark.parametrize("like", [False, True])
def test_labels_are_those_of_torch(corners: bool, source: tuple[int, int], target: tuple[int, int], like: bool) -> None:
    logits = torch.randn(2, 5, *source, generator=torch.Generator().manual_seed(3))
    inputs = {"logits": logits} | ({"like": torch.zeros(2, 3, *target)} if like else {})
    size = {"out_h": 0, "out_w": 0} if like else {"out_h": target[0], "out_w": target[1]}
    (labels,) = run("VssSegArgmax", inputs, {"labels": torch.int32}, **size, align_corners=int(corners))
    scores = F.interpolate(logits.double(), size=target, mode="bilinear", align_corners=corners)
    chosen = scores.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    assert labels.shape == (2, *target)
    assert float((scores.amax(1) - chosen).max()) < 1e-5


@pytest.fixture
def segnet(short_segnet: None) -> models.SegModel:
    torch.manual_seed(0)
    return models.build("segnet", num_classes=5, width=4).eval()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (69, 75)])
def test_segnet_as_plugin_pair_equals_its_native_rewrite(segnet: Any, size: tuple[int, int], tmp_path: Path) -> None:
    outputs = []
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    for plugins in (False, True):
        path = tmp_path / f"{plugins}.onnx"
        report = export(segnet, path, size=size, plugins=plugins)
        assert report["plugins"] == (["VssMaxPool", "VssMaxUnpool"] if plugins else [])
        outputs.append(onnxruntime.InferenceSession(str(path)).run(None, {"image": x.numpy()})[0])
        assert [str(each) for each in lint(path, plugins=[])] == []  # the bodies are TensorRT's own ops
    with torch.inference_mode():
        expected = segnet(x).numpy()
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-5
    assert np.abs(outputs[1] - expected).max() < 1e-5
    counts = {node.op_type for node in onnx.load(str(tmp_path / "True.onnx")).graph.node}
    assert "VssMaxUnpool" in counts and not counts & {"MaxPool", "ArgMax", "Where"}


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_labels_export_with_the_plugin_node(dtype: str, tmp_path: Path) -> None:
    """Parity with torch is proven by `export` itself; uint8 labels go by way of float32."""
    net, path = models.build("unet", num_classes=5, width=4, depth=1).eval(), tmp_path / "labels.onnx"
    preprocess = Preprocess(size=(32, 48))
    report = export(net, path, size=(32, 48), preprocess=preprocess, labels=True, labels_dtype=dtype, plugins=True)
    assert report["plugins"] == ["VssSegArgmax"] and report["parity"]["argmax_agreement"] >= 0.999
    nodes = onnx.load(str(path)).graph.node
    tail = ["Conv", "VssSegArgmax"] if dtype == "int32" else ["VssSegArgmax", "Cast", "Cast"]
    assert [node.op_type for node in nodes][-len(tail) :] == tail
    node = next(node for node in nodes if node.op_type == "VssSegArgmax")
    assert len(node.input) == 1
    assert {each.name: each.i for each in node.attribute} == {"out_h": 32, "out_w": 48, "align_corners": 0}
    assert lint(path) == [] and [each for each in lint(path, plugins=[]) if each.severity == "error"] == []


@pytest.mark.slow
def test_free_sizes_are_read_from_the_normalised_image(tmp_path: Path) -> None:
    net = models.build("unet", num_classes=5, width=4, depth=1).eval()
    path = tmp_path / "labels.onnx"
    preprocess = Preprocess(size=(32, 48))
    report = export(net, path, size=(32, 48), preprocess=preprocess, labels=True, plugins=True, dynamic_size=True)
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type == "VssSegArgmax")
    maker = next(other for other in model.graph.node if node.input[1] in other.output)
    assert maker.op_type == "Add"  # the shift of the normalisation: float32, not the uint8 image
    assert [row["input"][1:3] for row in report["parity"]["shapes"]] == [[32, 48], [36, 48], [40, 52]]


def test_without_its_body_a_node_is_for_tensorrt_alone(tmp_path: Path) -> None:
    net, path = models.build("unet", num_classes=3, width=4, depth=1).eval(), tmp_path / "labels.onnx"
    export(net, path, size=(32, 32), labels=True, plugins=True)
    with without_bodies(path, onnx.load(str(path)), {"VssSegArgmax"}) as stripped:
        assert stripped != path and len(onnx.load(str(stripped)).functions) == 0
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="VssSegArgmax"):
            onnxruntime.InferenceSession(str(stripped))
    with without_bodies(path, onnx.load(str(path)), {"Other"}) as same:
        assert same == path


def test_a_graph_that_has_nothing_for_a_plugin(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(VssError, match="nothing in this graph has a plugin: end it in labels"):
        export(tiny, tmp_path / "logits.onnx", size=(32, 48), plugins=True)
    assert not (tmp_path / "logits.onnx").exists()


def test_nodes_are_written_inside_of_an_export_alone() -> None:
    with onnx_nodes.plugin_nodes():
        assert not onnx_nodes.writes_nodes()


def test_python_and_cpp_agree_on_names_and_attributes() -> None:
    """The bodies declare the attributes that the C++ plugins read as fields."""
    sources = (Path(__file__).parents[2] / "plugins_trt").glob("*_plugin.cpp")
    text = "".join(source.read_text() for source in sources)
    structs = re.findall(r'kName = "(\w+)";.*?kFields\{(.*?)\};', text, re.DOTALL)
    fields = {name: re.findall(r'\{"(\w+)"', body) for name, body in structs}
    assert set(fields) == set(BODIES) == set(PLUGINS)
    for name, names in fields.items():
        inputs = {"VssMaxUnpool": ["a", "b"]}.get(name, ["a"])
        outputs = {"VssMaxPool": ["y", "z"]}.get(name, ["y"])
        node = helper.make_node(name, inputs, outputs, domain="vss", align_corners=0)
        graph = helper.make_graph([node], "g", [], [])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        add_bodies(model)
        assert list(model.functions[0].attribute) == names
