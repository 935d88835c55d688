"""A driver for TensorRT's bindings to meet: a device that is not there, and a small ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from recording import Install

from vss.deploy import trt_runner
from vss.deploy.trt_runner import Device

L4 = Device(0, "NVIDIA L4", (8, 9), 23034)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """From here on this machine has an L4, as far as the driver's answers go."""

    class Driver:
        def device(self, index: int = 0) -> Device:
            return L4

    monkeypatch.setattr(trt_runner, "Driver", Driver)
    monkeypatch.setattr("vss.deploy.trt.Driver", Driver)
    return L4


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Install:
    return Install(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """conv(image), dynamic batch."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in ("image", "logits")]
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["image", "w"], ["logits"])], "g", ends[:1], ends[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made.metadata_props.add(key="vss.model", value="tiny")
    path = tmp_path / "model.onnx"
    onnx.save(made, str(path))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timing"
