"""DeepLabV3: torchvision's network, its names, its heads and its groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.segmentation import deeplabv3_resnet50, deeplabv3_resnet101

from vss.core.errors import VssError
from vss.models import build, load_backbone
from vss.prune import Groups, find_groups

PUBLISHED = {  # torchvision's own networks with 21 classes and the auxiliary head
    "deeplabv3_resnet50": (deeplabv3_resnet50, 42_004_074),
    "deeplabv3_resnet101": (deeplabv3_resnet101, 60_996_202),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_size_are_torchvisions(name: str) -> None:
    factory, parameters = PUBLISHED[name]
    with torch.device("meta"):
        ours, theirs = build(name, 21), factory(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert sum(value.numel() for value in ours.parameters()) == parameters


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build("deeplabv3_resnet50", 12).eval()


@pytest.fixture(scope="module")
def groups(net: nn.Module) -> Groups:
    return find_groups(net, torch.zeros(1, 3, 64, 64))


def test_outputs_are_torchvisions_on_both_heads(net: nn.Module) -> None:
    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=12, aux_loss=True).eval()
    theirs.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 65, 72, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, got = theirs(x), net.forward_train(x)
        assert list(got) == ["out", "aux"]
        assert torch.equal(got["out"], wanted["out"]) and torch.equal(got["aux"], wanted["aux"])
        assert torch.equal(net(x), wanted["out"])
        assert net.forward_logits(x).shape == (1, 12, 9, 9)


def test_groups_are_those_of_the_published_table(groups: Groups) -> None:
    assert (len(groups), sum(group.channels for group in groups)) == (45, 13_504)
    assert [lock.layer for lock in groups.locked] == ["classifier.4", "aux_classifier.4"]
    streams = {"layer1": (256, 4), "layer2": (512, 5), "layer3": (1024, 7), "layer4": (2048, 4)}
    for stage, (channels, members) in streams.items():
        group = groups[f"backbone.{stage}.0.conv3"]
        assert (group.channels, len(group.module_names("producer"))) == (channels, members)
        assert len(group.module_names("norm")) == members
    readers = groups["backbone.layer4.0.conv3"].module_names("consumer")
    assert [name for name in readers if name.startswith("classifier")] == [
        "classifier.0.convs.0.0", "classifier.0.convs.1.0", "classifier.0.convs.2.0", "classifier.0.convs.3.0",
        "classifier.0.convs.4.1",
    ]  # fmt: skip
    assert "aux_classifier.0" in groups["backbone.layer3.0.conv3"].module_names("consumer")


def test_the_five_pyramid_branches_are_separate_slices_of_one_projection(groups: Groups) -> None:
    offsets = _offsets(groups, "classifier.0.project.0.weight")
    assert offsets == {
        "classifier.0.convs.0.0": 0,
        "classifier.0.convs.1.0": 256,
        "classifier.0.convs.2.0": 512,
        "classifier.0.convs.3.0": 768,
        "classifier.0.convs.4.1": 1024,
    }


def _offsets(groups: Groups, tensor: str) -> dict[str, int]:
    return {g.id: slot.offset for g in groups for slot in g.slots if slot.tensor == tensor and slot.dim == 1}


def test_without_the_auxiliary_head_there_is_one_output_and_one_group_less() -> None:
    net = build("deeplabv3_resnet50", 3, aux=False)
    assert list(net.eval().forward_train(torch.zeros(1, 3, 33, 33))) == ["out"]
    assert not any(key.startswith("aux") for key in net.state_dict())
    groups = find_groups(net, torch.zeros(1, 3, 64, 64))
    assert (len(groups), sum(group.channels for group in groups)) == (44, 13_504 - 256)


def test_backbone_takes_local_imagenet_weights(net: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = resnet50(weights=None)
    torch.save(source.state_dict(), tmp_path / "resnet50.pth")
    load_backbone(net.backbone, tmp_path / "resnet50.pth")
    kept = {key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(net.backbone.state_dict()[key], value) for key, value in kept.items())
    assert set(kept) == set(net.backbone.state_dict())


def test_weights_of_another_depth_are_refused(net: nn.Module, tmp_path: Path) -> None:
    with torch.device("cpu"):
        from torchvision.models import resnet18

        torch.save(resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(VssError, match="does not fit this backbone"):
        load_backbone(net.backbone, tmp_path / "resnet18.pth")
