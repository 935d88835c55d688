"""LR-ASPP on MobileNetV3: torchvision's network, its groups and its backbone weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.models import mobilenet_v3_large
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from vss.models import build, load_backbone
from vss.prune import find_groups


def test_outputs_are_torchvisions() -> None:
    torch.manual_seed(0)
    net = build("lraspp_mobilenet_v3_large", 21).eval()
    theirs = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    theirs.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 70, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(net(x), theirs(x)["out"])
    assert sum(value.numel() for value in net.parameters()) == 3_221_538  # torchvision's published count


def test_squeeze_excite_and_depthwise_layers_ride_with_the_expansion() -> None:
    groups = find_groups(build("lraspp_mobilenet_v3_large", 5), torch.zeros(1, 3, 64, 64))
    assert (len(groups), sum(group.channels for group in groups)) == (30, 7_544)
    expansion = groups["backbone.4.block.0.0"]
    assert expansion.channels == 72
    assert expansion.module_names("producer") == ["backbone.4.block.0.0", "backbone.4.block.2.fc2"]
    assert "backbone.4.block.1.0" in expansion.module_names("norm")  # the depthwise convolution
    assert expansion.module_names("consumer") == ["backbone.4.block.2.fc1", "backbone.4.block.3.0"]


def test_backbone_takes_local_imagenet_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = mobilenet_v3_large(weights=None)
    torch.save(source.state_dict(), tmp_path / "mobilenet.pth")
    net = build("lraspp_mobilenet_v3_large", 5)
    load_backbone(net.backbone, tmp_path / "mobilenet.pth")
    features = {k.removeprefix("features."): v for k, v in source.state_dict().items() if k.startswith("features.")}
    assert all(torch.equal(net.backbone.state_dict()[key], value) for key, value in features.items())
    assert set(features) == set(net.backbone.state_dict())
