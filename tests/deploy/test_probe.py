"""Engines that compute NaN or infinity, with their logits in sight and hidden behind labels."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from vss.core.errors import NotFinite
from vss.deploy import BACKENDS, TorchSession, export
from vss.deploy.backends.base import check_finite
from vss.deploy.onnx_file import deciding

from .conftest import SIZE

PIXELS = {"image": np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), dtype=np.uint8)}
FLOATS = {"image": np.random.default_rng(0).standard_normal((1, 3, *SIZE)).astype(np.float32)}


def spoiled(path: Path, to: Path, value: float) -> Path:
    """The file with one weight of its last convolution changed."""
    model = onnx.load(str(path))
    name = [node for node in model.graph.node if node.op_type == "Conv"][-1].input[1]
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    weight = onnx.numpy_helper.to_array(tensor).copy()
    weight.flat[0] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, str(to))
    return to


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("kind", ["labels", "logits"])
def test_a_spoiled_file_is_refused(exported: SimpleNamespace, tmp_path: Path, kind: str, value: float) -> None:
    source = getattr(exported, kind)[0]
    feed = PIXELS if kind == "labels" else {"image": 100 * FLOATS["image"]}
    whole, broken = (
        BACKENDS["onnxruntime"].open(path) for path in (source, spoiled(source, tmp_path / "x.onnx", value))
    )
    assert check_finite(whole, feed).keys() == {kind}
    if kind == "labels":
        assert broken.run(feed)["labels"].max() <= 4  # what would have been scored
        feed = feed if value != 3e38 else PIXELS
    with pytest.raises(NotFinite, match="NaN"):
        check_finite(broken, feed)


def test_what_labels_are_chosen_by_is_what_torch_computes(
    exported: SimpleNamespace, tiny: torch.nn.Module, preprocess: Any
) -> None:
    (found,) = BACKENDS["onnxruntime"].open(exported.labels[0]).probe(PIXELS).values()
    with torch.inference_mode():
        wanted = tiny(preprocess.normalise(torch.from_numpy(PIXELS["image"]).permute(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    (own,) = TorchSession(tiny, SIZE, preprocess=preprocess, labels=True).probe(PIXELS).values()
    np.testing.assert_allclose(own, wanted, atol=1e-6)
    assert BACKENDS["onnxruntime"].open(exported.logits[0]).probe(FLOATS) == {}
    assert deciding(onnx.load(str(exported.labels[0])).graph, "absent") is None


def test_the_export_of_a_diverged_network_is_one_sentence(tiny_class: Any, tmp_path: Path) -> None:
    net = tiny_class().eval()
    torch.nn.init.constant_(net.head.bias, math.nan)
    with pytest.raises(NotFinite, match="the network gives NaN or infinity"):
        export(net, tmp_path / "x.onnx", size=SIZE, labels=True)
    assert not (tmp_path / "x.onnx").exists()
