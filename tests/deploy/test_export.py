"""vss.deploy.export: what the file declares, holds and computes, read back with onnx and onnxruntime."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.core.files import sha256_file, sha256_tensors
from vss.deploy import export
from vss.models import build


def dims(value: onnx.ValueInfoProto) -> list:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_logits_file_declares_what_the_report_says(exported: SimpleNamespace) -> None:
    path, report = exported.logits
    model = onnx.load(path)
    assert [(each.name, dims(each)) for each in model.graph.input] == [("image", ["batch", 3, 32, 48])]
    assert [(each.name, dims(each)) for each in model.graph.output] == [("logits", ["batch", 5, 32, 48])]
    assert report["inputs"] == {"image": {"dtype": "float32", "shape": ["batch", 3, 32, 48]}}
    assert report["outputs"] == {"logits": {"dtype": "float32", "shape": ["batch", 5, 32, 48]}}
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert report["sha256"] == sha256_file(path)
    assert report["bytes"] == path.stat().st_size
    assert report["nodes_after"] == len(model.graph.node) < report["nodes_before"]
    assert json.loads(json.dumps(report)) == report


def test_labels_file_goes_from_uint8_pixels_to_uint8_labels_by_way_of_float(exported: SimpleNamespace) -> None:
    model = onnx.load(exported.labels[0])
    assert dims(model.graph.input[0]) == ["batch", 32, 48, 3]
    assert dims(model.graph.output[0]) == ["batch", 32, 48]
    types = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert types == [onnx.TensorProto.UINT8, onnx.TensorProto.UINT8]
    operators = [node.op_type for node in model.graph.node]
    assert operators[:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert operators[-4:] == ["Resize", "ArgMax", "Cast", "Cast"]
    casts = [node.attribute[0].i for node in model.graph.node[-2:]]
    assert casts == [onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8]
    assert "Shape" not in operators
    resize = model.graph.node[-4]
    assert {each.name: each.s for each in resize.attribute if each.type == onnx.AttributeProto.STRING}[
        "coordinate_transformation_mode"
    ] == b"half_pixel"


@pytest.mark.parametrize("batch", [1, 4])
def test_logits_equal_torch_at_batches_never_traced(exported: SimpleNamespace, tiny: Any, batch: int) -> None:
    x = torch.randn(batch, 3, 32, 48)
    session = onnxruntime.InferenceSession(exported.logits[0])
    found = session.run(None, {"image": x.numpy()})[0]
    expected = copy.deepcopy(tiny).double()(x.double()).detach().numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_labels_equal_torch(exported: SimpleNamespace, tiny: Any, preprocess: Any) -> None:
    image = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    found = onnxruntime.InferenceSession(exported.labels[0]).run(None, {"image": image.numpy()})[0]
    with torch.inference_mode():
        expected = tiny(preprocess.normalise(image.permute(0, 3, 1, 2))).argmax(1).numpy()
    assert found.dtype == np.uint8
    assert (found == expected).mean() > 0.999


def test_parity_is_reported_at_three_shapes(exported: SimpleNamespace) -> None:
    figures = exported.logits[1]["parity"]
    assert [row["input"] for row in figures["shapes"]] == [[1, 3, 32, 48], [2, 3, 32, 48], [3, 3, 32, 48]]
    assert 0 < figures["max_abs"] < 1e-4
    assert figures["argmax_agreement"] >= 0.999
    assert figures["max_rel"] == max(row["max_rel"] for row in figures["shapes"])
    assert "max_abs" not in exported.labels[1]["parity"]


def test_metadata_names_the_source(exported: SimpleNamespace, tiny: Any, preprocess: Any) -> None:
    found = {each.key: each.value for each in onnx.load(exported.logits[0]).metadata_props}
    assert found == exported.logits[1]["metadata"]
    assert found["vss.model"] == "tiny"
    assert json.loads(found["vss.size"]) == [32, 48]
    assert json.loads(found["vss.classes"]) == ["road", "sky", "car", "tree", "void"]
    assert found["vss.weights_sha256"] == sha256_tensors(tiny.state_dict())
    assert found["vss.plan_sha256"] == "f" * 64
    assert exported.labels[1]["metadata"]["vss.preprocess_sha256"] == preprocess.sha256


def test_file_holds_no_local_paths_and_comes_out_the_same_twice(
    exported: SimpleNamespace, tiny: Any, tmp_path: Path
) -> None:
    again = export(tiny, tmp_path / "again.onnx", size=(32, 48), class_names=list("abcde"), plan_sha256="f" * 64)
    first, second = onnx.load(exported.logits[0]), onnx.load(tmp_path / "again.onnx")
    for model in (first, second):
        del model.metadata_props[:]
        for node in model.graph.node:
            assert not node.metadata_props and not node.doc_string
    assert first == second
    assert again["nodes_after"] == exported.logits[1]["nodes_after"]
    assert str(Path(__file__).parent).encode() not in exported.logits[0].read_bytes()


def test_source_network_and_logging_are_left_alone(tiny_class: type, tmp_path: Path) -> None:
    network, level = tiny_class().train(), logging.getLogger("torch.onnx").level
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(network, tmp_path / "x.onnx", size=(32, 48), parity_batches=[1])
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level


def test_dynamic_size_runs_at_sizes_never_traced(tiny: Any, tmp_path: Path) -> None:
    report = export(tiny, tmp_path / "x.onnx", size=(32, 48), dynamic_size=True)
    assert report["inputs"]["image"]["shape"] == ["batch", 3, "4*height", "4*width"]
    assert [row["input"] for row in report["parity"]["shapes"]] == [[1, 3, 32, 48], [2, 3, 40, 48], [3, 3, 48, 56]]
    x = torch.randn(1, 3, 64, 20)
    found = onnxruntime.InferenceSession(tmp_path / "x.onnx").run(None, {"image": x.numpy()})[0]
    assert np.abs(found - tiny(x).detach().numpy()).max() < 1e-4


@pytest.mark.parametrize(("name", "options"), [("unet", {"width": 4, "depth": 1}), ("resnet18_seg", {})])
def test_networks_of_this_package(name: str, options: dict, preprocess: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build(name, 5, **options).eval()
    report = export(network, tmp_path / "x.onnx", size=(64, 96), preprocess=preprocess, labels=True)
    assert report["outputs"] == {"labels": {"dtype": "int32", "shape": ["batch", 64, 96]}}
    assert report["parity"]["argmax_agreement"] >= 0.999
    assert report["metadata"]["vss.options"] == json.dumps(options, sort_keys=True)


class Untraceable(nn.Module):
    """Branches on data: torch.export refuses it."""

    name, size_multiple, num_classes, options = "untraceable", 1, 2, {}

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x]) if float(x.sum()) > 0 else x


class Unfaithful(nn.Module):
    """Computes something else once it is exported."""

    name, size_multiple, num_classes, options = "unfaithful", 1, 3, {}

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.01 if torch.compiler.is_exporting() else x


@pytest.mark.parametrize("labels", [False, True])
def test_a_wrong_graph_is_refused_and_leaves_nothing(labels: bool, tmp_path: Path) -> None:
    class Flipped(Unfaithful):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(1) if torch.compiler.is_exporting() else x

    with pytest.raises(VssError, match=r"the ONNX differs from torch at \[1, 3, 8, 8\]"):
        export(Flipped() if labels else Unfaithful(), tmp_path / "x.onnx", size=(8, 8), labels=labels)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_exported_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(VssError, match="untraceable cannot be exported to ONNX opset 20") as caught:
        export(Untraceable(), tmp_path / "x.onnx", size=(8, 8))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": (30, 48)}, "multiples of 4, got 30 x 48; use 32 x 48"),
        ({"size": (0, 48)}, "multiples of 4, got 0 x 48; use 4 x 48"),
        ({"size": (32, 48), "class_names": ["a"]}, "tiny has 5 classes, got 1 class names"),
        ({"size": (32, 48), "labels": True, "labels_dtype": "int64"}, "labels_dtype is 'int64'"),
        ({"size": (32, 48), "parity_sizes": [(32, 48)]}, "1 parity sizes for 3 batch sizes"),
        ({"size": (32, 48), "parity_sizes": [(32, 48)] * 2 + [(64, 48)]}, "need dynamic_size=True"),
    ],
)
def test_bad_requests(tiny: Any, tmp_path: Path, arguments: dict, words: str) -> None:
    with pytest.raises(VssError, match=words):
        export(tiny, tmp_path / "x.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []
