"""Sliced files against networks cut in torch, biases of folded batch norms and grouped convolutions included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.prune.nets import few_blocks, randomise
from vss import models
from vss.data.preprocess import Preprocess
from vss.deploy import BACKENDS, export
from vss.deploy.graph import SegGraph
from vss.deploy.profile.setting import ExportedVariants, SlicedVariants, cut_to, make_variants
from vss.prune import find_groups


def outputs(path: Path, image: np.ndarray) -> np.ndarray:
    session = BACKENDS["onnxruntime"].open(path, threads=1)
    return next(iter(session.run({"image": image}).values()))


@pytest.mark.parametrize("share", [0.3, 0.55, 1.0])
def test_a_sliced_file_is_the_cut_network(variants: SlicedVariants, net: Any, preprocess: Any, tmp_path: Path,
                                          share: float) -> None:  # fmt: skip
    widths = [max(1, int(group.channels * share)) for group in variants.groups]
    image = np.random.default_rng(1).integers(0, 256, (1, *preprocess.size, 3), dtype=np.uint8)
    got = outputs(variants.write(widths, tmp_path / "v.onnx"), image)
    cut = cut_to(net, variants.groups, widths)
    with torch.no_grad():
        wanted = SegGraph(cut, preprocess=preprocess).eval()(torch.from_numpy(image)).numpy()
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    initializers = onnx.load(str(tmp_path / "v.onnx")).graph.initializer
    weights = sum(int(np.prod(each.dims)) for each in initializers if each.name.endswith("weight"))
    assert weights == sum(p.numel() for name, p in cut.named_parameters() if p.ndim == 4)


def test_depthwise_layers_and_a_global_pool_can_be_sliced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with few_blocks():
        net = randomise(models.build("lraspp_mobilenet_v3_large", 4))
    groups = list(find_groups(net, torch.zeros(1, 3, 64, 64)))
    made = make_variants(net, groups, tmp_path, preprocess=Preprocess(size=(64, 64)), options={"labels": True})
    assert isinstance(made, SlicedVariants)
    widths = [group.channels // 2 for group in groups]
    attributes = {
        node.input[1]: next(a.i for a in node.attribute if a.name == "group")
        for node in made.graph(widths, empty=True).graph.node
        if node.op_type == "Conv"
    }
    cut = cut_to(net, groups, widths)
    depthwise = {f"model.{n}.weight": m.groups for n, m in cut.named_modules() if getattr(m, "groups", 1) > 1}
    assert len(depthwise) > 5
    assert {name: attributes[name] for name in depthwise} == depthwise


def test_a_graph_with_widths_in_constants_is_exported_anew(
    short_segnet: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    net = randomise(models.build("segnet", 3, width=16))
    preprocess = Preprocess(size=(32, 32))
    groups = list(find_groups(net, torch.zeros(1, 3, 32, 32)))
    caplog.set_level("INFO")
    made = make_variants(net, groups, tmp_path, preprocess=preprocess, options={"labels": True})
    assert isinstance(made, ExportedVariants)
    assert "every width is exported by itself" in caplog.text
    widths = [max(1, group.channels // 8) for group in groups]
    image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    got = outputs(made.write(widths, tmp_path / "v.onnx"), image)
    export(cut_to(net, groups, widths), tmp_path / "own.onnx", size=(32, 32), preprocess=preprocess, labels=True,
           parity_batches=(1,))  # fmt: skip
    assert np.array_equal(got, outputs(tmp_path / "own.onnx", image))
