"""FCN: torchvision's network, its names, its heads and its groups."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.segmentation import fcn_resnet50, fcn_resnet101

from vss.models import build
from vss.prune import find_groups

PUBLISHED = {  # torchvision's own networks with 21 classes and the auxiliary head
    "fcn_resnet50": (fcn_resnet50, 35_322_218),
    "fcn_resnet101": (fcn_resnet101, 54_314_346),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_size_are_torchvisions(name: str) -> None:
    factory, parameters = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = build(name, 21), factory(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert sum(value.numel() for value in ours.parameters()) == parameters


def test_outputs_and_groups() -> None:
    torch.manual_seed(0)
    net = build("fcn_resnet50", 12).eval()
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=12, aux_loss=True).eval()
    theirs.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = theirs(x), net.forward_train(x)
        assert torch.equal(got["out"], wanted["out"]) and torch.equal(got["aux"], wanted["aux"])
        assert torch.equal(net(x), wanted["out"])
    groups = find_groups(net, torch.zeros(1, 3, 64, 64))
    assert (len(groups), sum(group.channels for group in groups)) == (39, 12_224)
    assert (groups["classifier.0"].channels, groups["aux_classifier.0"].channels) == (512, 256)
    assert [lock.layer for lock in groups.locked] == ["classifier.4", "aux_classifier.4"]
