"""SegDecNet: the published widths, counts and names, FeatureNorm against float64, gradient multipliers, groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.deploy import export
from vss.models import DefectModel, build
from vss.models.segdecnet import SCOPES, FeatureNorm, SegDecNet, gradient_multiply
from vss.prune import apply_plan, count, find_groups, make_plan, masked
from vss.run.pruning import network_to_prune

# widths, million parameters and true GMAC at 640 x 232 of the 19 published models
ROWS = [
    ("baseline", (32, 64, 64, 64, 1024), 15.639, 47.99),
    ("naive_l1_r20", (25, 51, 51, 51, 819), 10.005, 30.60),
    ("naive_l1_r40", (19, 38, 38, 38, 614), 5.627, 17.15),
    ("naive_l1_r60", (12, 25, 25, 25, 409), 2.503, 7.54),
    ("naive_fn_r20", (13, 39, 44, 34, 916), 7.420, 21.03),
    ("naive_fn_r40", (12, 32, 38, 29, 656), 4.583, 13.43),
    ("naive_fn_r60", (11, 31, 36, 27, 375), 2.506, 8.38),
    ("ours_c1_r20", (25, 48, 48, 48, 832), 9.549, 28.75),
    ("ours_c1_r40", (19, 40, 40, 40, 608), 5.873, 18.14),
    ("ours_c1_r60", (12, 24, 24, 24, 416), 2.442, 7.26),
    ("ours_c2_r20", (25, 48, 48, 48, 832), 9.549, 28.75),
    ("ours_c2_r40", (19, 40, 40, 40, 608), 5.873, 18.14),
    ("ours_c2_r60", (12, 24, 24, 24, 416), 2.442, 7.26),
    ("ours_c3_r20", (25, 51, 51, 51, 819), 10.005, 30.60),
    ("ours_c3_r40", (19, 38, 38, 38, 614), 5.627, 17.15),
    ("ours_c3_r60", (12, 25, 25, 25, 409), 2.503, 7.54),
    ("ours_c4_r20", (25, 51, 51, 51, 819), 10.005, 30.60),
    ("ours_c4_r40", (19, 38, 38, 38, 614), 5.627, 17.15),
    ("ours_c4_r60", (12, 25, 25, 25, 409), 2.503, 7.54),
]


def closed_form(c1: int, c2: int, c3: int, c4: int, c5: int) -> int:
    """Parameters of the network, layer by layer: filters, then scale and bias of each norm."""
    volume = 75 * c1 + 2 * c1 + 25 * c1 * c2 + 2 * c2 + 25 * c2 * c3 + 2 * c3 + 25 * c3 * c4 + 2 * c4
    volume += 4 * (25 * c4**2 + 2 * c4) + 225 * c4 * c5 + 2 * c5
    return volume + (c5 + 2) + (200 * (c5 + 1) + 16) + (3200 + 32) + (12800 + 64) + 67


@pytest.mark.parametrize(("widths", "millions", "gmac"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_segdec_param_formula_and_macs_of_the_published_rows(
    widths: tuple[int, ...], millions: float, gmac: float
) -> None:
    with torch.device("meta"):
        net = build("segdecnet", 1, widths=widths)
    parameters = sum(value.numel() for value in net.parameters())
    assert parameters == closed_form(*widths)
    assert round(parameters / 1e6, 3) == millions
    assert round(count(net, (640, 232))["macs_g"], 2) == gmac


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        net = build("segdecnet", 1)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert sum(value.numel() for value in net.parameters()) == 15_638_813
    blocks = [f"volume.{index}" for index in (0, 2, 3, 4, 6, 7, 8, 9, 11)] + [f"extractor.{i}" for i in (1, 3, 5)]
    names = [f"{block}.{leaf}" for block in blocks for leaf in ("0.weight", "1.scale", "1.bias")]
    names += ["seg_mask.0.weight", "seg_mask.1.scale", "seg_mask.1.bias", "fc.weight", "fc.bias"]
    assert set(shapes) == set(names)
    assert shapes["volume.11.0.weight"] == (1024, 64, 15, 15) and shapes["volume.11.1.scale"] == (1, 1024, 1, 1)
    assert shapes["extractor.1.0.weight"] == (8, 1025, 5, 5) and shapes["fc.weight"] == (1, 66)


def test_featurenorm_sqrt_std_is_the_root_of_the_unbiased_deviation() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    norm = FeatureNorm(3)
    with torch.no_grad():
        norm.scale.copy_(torch.tensor([0.5, 2.0, -1.0]).view(1, 3, 1, 1))
        norm.bias.copy_(torch.tensor([0.1, 0.0, 3.0]).view(1, 3, 1, 1))
    data = x.numpy().astype(np.float64)
    mean, std = data.mean(axis=(2, 3), keepdims=True), data.std(axis=(2, 3), ddof=1, keepdims=True)
    scale, bias = (value.detach().double().numpy() for value in (norm.scale, norm.bias))
    wanted = scale * (data - mean) / np.sqrt(std + 1e-3) + bias
    assert np.abs(norm(x).detach().numpy() - wanted).max() < 1e-6


def test_feature_norm_follows_the_square_root_of_the_scale_and_keeps_images_apart() -> None:
    x = 100 * torch.randn(2, 2, 9, 9, generator=torch.Generator().manual_seed(1))
    norm = FeatureNorm(2)
    assert torch.allclose(norm(4 * x), 2 * norm(x), rtol=1e-4)
    assert torch.equal(norm(x)[:1], norm(x[:1]))
    assert torch.equal(norm(torch.full((1, 2, 3, 3), 7.0)), torch.zeros(1, 2, 3, 3))
    assert torch.isnan(norm(torch.ones(1, 2, 1, 1))).all()


def test_without_bias_the_bias_is_a_frozen_zero() -> None:
    norm = FeatureNorm(2, include_bias=False)
    assert not norm.bias.requires_grad and norm.scale.requires_grad and float(norm.bias.abs().max()) == 0
    assert SegDecNet(widths=(4, 4, 4, 4, 8)).seg_mask[1].bias.requires_grad  # as published


@pytest.fixture(scope="module")
def net() -> SegDecNet:
    torch.manual_seed(0)
    return build("segdecnet", 1, widths=(6, 8, 8, 8, 24)).eval()


def test_outputs_and_the_order_of_the_decision_features(net: SegDecNet) -> None:
    x = torch.randn(2, 3, 128, 72, generator=torch.Generator().manual_seed(2))
    assert isinstance(net, DefectModel) and net.task == "defect"
    with torch.no_grad():
        decision, seg = net(x)
        volume = net.volume(x)
        features = net.extractor(torch.cat([volume, seg], 1)).flatten(2)
        flat = seg.flatten(2)
        columns = [features.max(2).values, features.mean(2), flat.max(2).values, flat.mean(2)]
        wanted = torch.cat(columns, 1) @ net.fc.weight.T + net.fc.bias
    assert decision.shape == (2, 1) and seg.shape == (2, 1, 16, 9)
    assert torch.allclose(decision, wanted, atol=1e-5)
    assert list(net.forward_train(x)) == ["decision", "seg"]
    labels = net.predict(x)
    assert labels.shape == (2, 128, 72) and labels.dtype == torch.uint8 and set(labels.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_the_gradient_multiplier_scales_what_the_decision_sends_back(net: SegDecNet, factor: float) -> None:
    x = torch.randn(1, 3, 128, 64, generator=torch.Generator().manual_seed(3))
    weights = {"volume": net.volume[0][0].weight, "extractor": net.extractor[5][0].weight}

    def gradients(multiplier: float) -> dict[str, torch.Tensor]:
        net.gradient_multiplier = multiplier
        found = torch.autograd.grad(net(x)[0].sum(), list(weights.values()))
        net.gradient_multiplier = 1.0
        return dict(zip(weights, found, strict=True))

    full, scaled = gradients(1.0), gradients(factor)
    assert float(full["volume"].abs().max()) > 0
    assert torch.allclose(scaled["volume"], factor * full["volume"], rtol=1e-4, atol=1e-9)
    assert torch.equal(scaled["extractor"], full["extractor"])


def test_gradient_multiply_is_the_identity_forward_and_exact_backward() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gradient_multiply(x, 0.5), x)
    (gradient,) = torch.autograd.grad((gradient_multiply(x, 0.5) ** 2).sum(), x)
    assert torch.equal(gradient, x.detach())


def test_groups_and_the_published_scope(net: SegDecNet) -> None:
    example = torch.zeros(1, 3, 128, 64)
    groups = find_groups(net, example)
    volume = [f"volume.{index}.0" for index in (0, 2, 3, 4, 6, 7, 8, 9, 11)]
    assert [group.id for group in groups] == [*volume, "extractor.1.0", "extractor.3.0", "extractor.5.0"]
    last = groups["volume.11.0"]
    readers = [(slot.tensor, slot.dim, slot.offset) for slot in last.by_role("consumer")]
    assert readers == [("seg_mask.0.weight", 1, 0), ("extractor.1.0.weight", 1, 0)]
    assert [(slot.tensor, slot.dim) for slot in last.by_role("norm")] == [
        ("volume.11.1.scale", 1),
        ("volume.11.1.bias", 1),
    ]
    columns = sorted(slot.offset for slot in groups["extractor.5.0"].slots if slot.tensor == "fc.weight")
    assert columns == [0, 32]
    assert [lock.layer for lock in groups.locked] == ["seg_mask.0", "fc"]
    assert [group.id for group in find_groups(net, example, keep=SCOPES["volume"])] == volume


def test_segdec_depgraph_forward_of_half_the_channels_is_the_masked_forward(net: SegDecNet) -> None:
    net.eval()
    plan = make_plan(net, torch.zeros(1, 3, 128, 64), criterion="l1", budget={"kind": "channels", "keep": 0.5})
    small = apply_plan(net, plan)
    x = torch.randn(2, 3, 160, 96, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for cut, whole in zip(small(x), masked(net, plan)(x), strict=True):
            torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


def test_the_file_has_both_heads(net: SegDecNet, tmp_path: Path) -> None:
    report = export(net, tmp_path / "net.onnx", size=(128, 72), parity_batches=(1, 2))
    assert report["outputs"] == {
        "decision": {"dtype": "float32", "shape": ["batch", 1]},
        "seg": {"dtype": "float32", "shape": ["batch", 1, 16, 9]},
    }
    assert report["parity"]["max_rel"] < 1e-4 and report["parity"]["argmax_agreement"] == 1.0
    x = torch.randn(2, 3, 128, 72, generator=torch.Generator().manual_seed(4))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    decision, seg = session.run(["decision", "seg"], {"image": x.numpy()})
    with torch.no_grad():
        wanted = net(x)
    assert np.abs(decision - wanted[0].numpy()).max() < 1e-3 * float(wanted[0].abs().max())
    assert np.abs(seg - wanted[1].numpy()).max() < 1e-3 * float(wanted[1].abs().max())
    assert "If" not in {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}


def test_requests_that_it_cannot_meet(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(VssError, match="one class, the defect; got num_classes 3"):
        build("segdecnet", 3)
    with pytest.raises(VssError, match=r"option widths\[2\] of model .segdecnet. is .*; Field required"):
        build("segdecnet", 1, widths=(8, 8))
    with pytest.raises(VssError, match="multiples of 8, got 130x64"):
        net(torch.zeros(1, 3, 130, 64))
    with pytest.raises(VssError, match=r"at least 64x128 pixels, got 64x64: .*give a larger --input-size"):
        net(torch.zeros(1, 3, 64, 64))
    with pytest.raises(VssError, match="exported at one size"):
        export(net, tmp_path / "net.onnx", size=(128, 64), dynamic_size=True)
    with pytest.raises(VssError, match="no labels"):
        export(net, tmp_path / "net.onnx", size=(128, 64), labels=True)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_load_and_are_pruned(net: SegDecNet, defect_root: Path, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "final_state_dict.pth"
    torch.save({prefix + key: value for key, value in net.state_dict().items()}, path)
    recipe = Recipe.model_validate({"model": {"options": net.options}})
    project, loaded = network_to_prune(
        recipe, None, "segdecnet", path, dataset="ksdd2", data_root=str(defect_root), size=[128, 64]
    )
    x = torch.randn(1, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, theirs in zip(loaded.eval()(x), net.eval()(x), strict=True):
            assert torch.equal(ours, theirs)
    assert project.task.classes == ("defect",)
    torch.save({key.replace("scale", "weight"): value for key, value in net.state_dict().items()}, path)
    with pytest.raises(VssError, match=r"it has no volume.0.1.scale"):
        network_to_prune(recipe, None, "segdecnet", path, dataset="ksdd2", data_root=str(defect_root), size=[128, 64])


@pytest.mark.parametrize("removed", [0.2, 0.4, 0.6])
def test_c1_slices_consumers_by_the_kept_channels_and_not_by_the_first_ones(removed: float) -> None:
    torch.manual_seed(3)
    net = build("segdecnet", 1, widths=(8, 64, 64, 64, 256)).eval()
    budget = {"kind": "channels", "keep": 1 - removed, "scope": "local"}
    plan = make_plan(net, torch.zeros(1, 3, 128, 64), criterion="hw_l1", budget=budget, keep=SCOPES["volume"])
    small = apply_plan(net, plan)
    kept = {group.id.removesuffix(".0"): group.kept for group in plan.groups}
    widths = [len(kept[f"volume.{index}"]) for index in (0, 2, 3, 4, 6, 7, 8, 9, 11)]
    aligned, last = {0.2: (48, 192), 0.4: (40, 160), 0.6: (24, 96)}[removed]
    assert widths == [int(8 * (1 - removed) + 1e-9), *[aligned] * 7, last]
    for before, after in (("volume.3", "volume.4"), ("volume.9", "volume.11"), ("volume.11", "seg_mask")):
        rows = range(1) if after == "seg_mask" else kept[after]
        whole = net.get_submodule(after)[0].weight[list(rows)]
        assert torch.equal(small.get_submodule(after)[0].weight, whole[:, list(kept[before])])
        assert not torch.equal(small.get_submodule(after)[0].weight, whole[:, : len(kept[before])])
    columns = [*kept["volume.11"], 256]  # the map, the last channel of the concatenation, stays
    assert torch.equal(small.extractor[1][0].weight, net.extractor[1][0].weight[:, columns])
    with torch.no_grad():
        x = torch.randn(1, 3, 128, 64)
        for cut, gated in zip(small(x), masked(net, plan)(x), strict=True):
            torch.testing.assert_close(cut, gated, rtol=1e-4, atol=1e-5)
