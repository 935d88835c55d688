"""vss.deploy.backends.ort: the onnxruntime backend on files good and bad."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.deploy import BACKENDS, Binding, BuildSpec
from vss.deploy.backends.ort import OnnxRuntimeSession

ORT = BACKENDS["onnxruntime"]


def test_bindings_and_numbers(exported: SimpleNamespace, tiny: Any) -> None:
    session = ORT.open(exported.logits[0], threads=1)
    assert session.inputs == {"image": Binding((None, 3, 32, 48), "float32")}
    assert session.outputs == {"logits": Binding((None, 5, 32, 48), "float32")}
    x = torch.randn(2, 3, 32, 48)
    assert np.abs(session.run({"image": x.numpy()})["logits"] - tiny(x).detach().numpy()).max() < 1e-5
    about = session.describe()
    assert about["threads"] == 1
    assert about["device"] == "cpu"
    assert about["artefact_sha256"] == exported.logits[1]["sha256"]
    assert about["metadata"]["vss.model"] == "tiny"
    assert ORT.open(exported.labels[0]).inputs == {"image": Binding((None, 32, 48, 3), "uint8")}
    assert ORT.open(exported.labels[0]).outputs == {"labels": Binding((None, 32, 48), "uint8")}


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_optimisation_levels_agree(exported: SimpleNamespace, tiny: Any, level: str) -> None:
    x = torch.randn(1, 3, 32, 48)
    found = ORT.open(exported.logits[0], optimisation=level).run({"image": x.numpy()})["logits"]
    assert np.abs(found - tiny(x).detach().numpy()).max() < 1e-5


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return bytes(255 - byte for byte in data)


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b'{"kind": "vss.report"}'])
def test_damaged_files_are_one_sentence(exported: SimpleNamespace, tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(damage(exported.logits[0].read_bytes()))
    with pytest.raises(VssError, match=r"bad\.onnx cannot be opened as ONNX .* export it again") as caught:
        ORT.open(path)
    assert "\n" not in str(caught.value)
    out = tmp_path / "out.onnx"
    with pytest.raises(VssError, match="cannot be opened"):
        ORT.build(path, out, BuildSpec())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.onnx"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, "threads is 0; expected 1 or more"),
        ({"optimisation": "most"}, "optimisation is 'most'; expected one of disabled, basic"),
        ({"provider": "tpu"}, "provider is 'tpu'; expected one of cpu, cuda"),
    ],
)
def test_bad_options(exported: SimpleNamespace, options: dict, words: str) -> None:
    with pytest.raises(VssError, match=words):
        ORT.open(exported.logits[0], **options)


def test_cuda_that_is_not_there_is_no_silent_fallback(
    exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(VssError, match=r"no CUDAExecutionProvider .* pip install onnxruntime-gpu"):
        ORT.open(exported.logits[0], provider="cuda")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"none\.onnx does not exist; expected an ONNX file"):
        ORT.open(tmp_path / "none.onnx")


def test_build_copies_or_optimises(exported: SimpleNamespace, tiny: Any, tmp_path: Path) -> None:
    source = exported.logits[0]
    assert sha256_file(ORT.build(source, tmp_path / "same.onnx", BuildSpec())) == exported.logits[1]["sha256"]
    optimised = ORT.build(source, tmp_path / "fast.onnx", BuildSpec(optimise="extended"))
    assert sha256_file(optimised) != exported.logits[1]["sha256"]
    x = torch.randn(2, 3, 32, 48)
    found = ORT.open(optimised).run({"image": x.numpy()})["logits"]
    assert np.abs(found - tiny(x).detach().numpy()).max() < 1e-5
    with pytest.raises(VssError, match="optimise is 'all'; expected basic, extended or nothing"):
        ORT.build(source, tmp_path / "x.onnx", BuildSpec(optimise="all"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fast.onnx", "same.onnx"]


def test_unavailable_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ORT.unavailable() is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in str(ORT.unavailable())


def test_a_failure_inside_of_the_runtime_is_one_sentence(tmp_path: Path) -> None:
    """A graph whose shapes lie: onnxruntime finds out while it runs."""
    from onnx import TensorProto, helper, save

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 4])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [3, 5])
    node = helper.make_node("Reshape", ["image", "shape"], ["logits"])
    graph = helper.make_graph([node], "g", [image], [out], [shape])
    path = tmp_path / "lies.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(VssError, match="onnxruntime failed on this input") as caught:
        OnnxRuntimeSession(path).run({"image": np.ones((2, 4), np.float32)})
    assert "\n" not in str(caught.value)
