"""SegNet: shape, size, VGG's names, and pooling indices that tie encoder and decoder."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16_bn

from vss.core.errors import VssError
from vss.deploy import export
from vss.models import build, load_backbone, segnet
from vss.models.segnet import max_pool_phases, max_unpool_phases
from vss.prune import Groups, find_groups


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build("segnet", 5, width=8).eval()


@pytest.fixture(scope="module")
def groups(net: nn.Module) -> Groups:
    return find_groups(net, torch.zeros(1, 3, 64, 64))


def test_encoder_is_vgg16_and_takes_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = {key: value for key, value in vgg16_bn(weights=None).state_dict().items() if "classifier" not in key}
    torch.save(source | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.pth")
    net = build("segnet", 12)
    load_backbone(net.backbone, tmp_path / "vgg.pth")
    assert all(torch.equal(net.backbone.state_dict()[key], value) for key, value in source.items())
    assert set(source) == set(net.backbone.state_dict())
    # 14,723,136 of VGG16-BN's convolutions, 14,716,160 of the mirrored decoder without its first layer, the head
    decoder = sum(p.numel() for p in net.decoder.parameters())
    encoder = sum(p.numel() for p in net.backbone.parameters())
    assert (encoder, decoder) == (14_723_136, 14_716_160)
    assert sum(p.numel() for p in net.classifier.parameters()) == 64 * 12 * 9 + 12


@pytest.mark.parametrize("size", [(64, 64), (45, 67), (32, 33)])
def test_logits_have_the_size_of_the_image(net: nn.Module, size: tuple[int, int]) -> None:
    assert net.forward_logits(torch.zeros(1, 3, *size)).shape == (1, 5, *size)


def test_small_images_and_multiples_are_refused(net: nn.Module) -> None:
    with pytest.raises(VssError, match="at least 32x32 pixels, got 31x40"):
        net(torch.zeros(1, 3, 31, 40))
    with pytest.raises(VssError, match="multiples of 32, got 48x64"):
        build("segnet", 5, width=4, multiple=32)(torch.zeros(1, 3, 48, 64))


def test_segnet_unpool_tied_to_the_pooled_channels(groups: Groups) -> None:
    owner = {name: group for group in groups for name in group.module_names("producer")}
    pairs = {
        "decoder.0.2.0": "backbone.features.30",  # 512 at 1/8
        "decoder.1.2.0": "backbone.features.20",  # 256 at 1/4
        "decoder.2.2.0": "backbone.features.10",  # 128 at 1/2
        "decoder.3.1.0": "backbone.features.3",  # 64 at 1
    }
    for unpooled, pooled in pairs.items():
        assert owner[unpooled] is owner[pooled]
        assert owner[pooled].module_names("producer") == [pooled, unpooled]
    assert (len(groups), sum(group.channels for group in groups)) == (21, 6976 // 8)
    assert [lock.layer for lock in groups.locked] == ["classifier"]


def test_keeping_the_decoder_layer_keeps_the_encoder_layer(net: nn.Module, groups: Groups) -> None:
    found = find_groups(net, torch.zeros(1, 3, 64, 64), keep=["decoder.3.1"])
    assert {group.id for group in groups} - {group.id for group in found} == {"backbone.features.3"}
    assert [(lock.layer, lock.reason) for lock in found.locked[:2]] == [
        ("backbone.features.3", "it was asked to stay"),
        ("decoder.3.1.0", "it was asked to stay"),
    ]


@pytest.mark.parametrize("size", [(64, 64), (45, 67)])
def test_exported_form_equals_the_index_form(
    net: nn.Module, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted: Tensor = net(x)
        monkeypatch.setattr(segnet, "max_pool", max_pool_phases)
        monkeypatch.setattr(segnet, "max_unpool", max_unpool_phases)
        assert float((net(x) - wanted).abs().max()) == 0.0


def test_the_file_holds_no_index_operator_and_fits_odd_sizes(net: nn.Module, tmp_path: Path) -> None:
    report = export(net, tmp_path / "net.onnx", size=(45, 67), parity_batches=(1, 3))
    assert report["parity"]["max_rel"] < 1e-5
    model = onnx.load(tmp_path / "net.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"MaxUnpool", "ScatterND", "ScatterElements", "GatherND"}
    assert [len(node.output) for node in model.graph.node if node.op_type == "MaxPool"] == [1] * 5


def test_one_graph_for_many_sizes_needs_multiples_of_32(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(VssError, match="build it for multiples of 32"):
        export(net, tmp_path / "net.onnx", size=(64, 64), dynamic_size=True)
