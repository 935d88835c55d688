"""The ResNet networks: strides, dilation and the top-down sum."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import resnet18

from vss import models
from vss.models.torchvision import ResNetFeatures, ResNetSeg


@torch.no_grad()
@pytest.mark.parametrize(
    ("dilate", "sides"),
    [
        ((False, False, False), [16, 8, 4, 2]),
        ((False, False, True), [16, 8, 4, 4]),
        ((False, True, True), [16, 8, 8, 8]),
    ],
)
def test_dilation_keeps_the_resolution_and_the_tensors(dilate: tuple[bool, bool, bool], sides: list[int]) -> None:
    torch.manual_seed(0)
    net = models.build("resnet50_seg", 5, decoder=8, dilate=dilate).eval()
    features = net.backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape) for f in features] == [
        (1, channels, side, side) for channels, side in zip((256, 512, 1024, 2048), sides, strict=True)
    ]
    plain = ResNetFeatures(50).state_dict()
    assert {k: v.shape for k, v in net.backbone.state_dict().items()} == {k: v.shape for k, v in plain.items()}
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 5, 64, 64)


def test_basic_blocks_do_not_dilate() -> None:
    with pytest.raises(ValueError, match="ResNet-18 has basic blocks"):
        ResNetSeg(5, depth=18, dilate=(False, False, True))


@torch.no_grad()
def test_features_are_torchvisions() -> None:
    torch.manual_seed(0)
    reference = resnet18(weights=None).eval()
    backbone = ResNetFeatures(18).eval()
    ours = {k.replace("stem.0.", "conv1.").replace("stem.1.", "bn1."): v for k, v in backbone.state_dict().items()}
    reference.load_state_dict(ours, strict=False)
    x = torch.randn(2, 3, 64, 64)
    pooled = reference.fc(backbone(x)[-1].mean((2, 3)))
    torch.testing.assert_close(pooled, reference(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_top_down_path_by_hand() -> None:
    torch.manual_seed(0)
    net = models.build("resnet18_seg", 5, decoder=8).eval()
    x = torch.randn(1, 3, 64, 96)
    c1, c2, c3, c4 = net.backbone(x)
    top = net.lateral[3](c4)
    for lateral, feature in ((net.lateral[2], c3), (net.lateral[1], c2), (net.lateral[0], c1)):
        top = F.interpolate(top, size=feature.shape[-2:], mode="bilinear") + lateral(feature)
    torch.testing.assert_close(net.forward_logits(x), net.classifier(net.fuse(F.relu(top))))
    assert net.forward_logits(x).shape == (1, 5, 16, 24)
