"""Weights that something else has trained: whatever a file has around them, they fit whole, but for the head."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vss
from vss.core.errors import VssError
from vss.models import build, load_backbone, load_weights, wrap
from vss.prune import apply_plan, make_plan
from vss.train import checkpoint

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
State = dict[str, Any]


class Mine(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "flat": lambda state: state,
    "module": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "net": lambda state: {"net": state, "epoch": 3},
    "ema": lambda state: {"ema": prefixed("module.")(state), "optimizer": {"lr": 0.1}},
    "model_state": lambda state: {"model_state": state},
    "lightning": lambda state: {"state_dict": {**prefixed("model.")(state), "loss.weight": torch.ones(3)}},
    "counters": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "trainer": lambda state: {"model": state, "epoch": torch.tensor(3), "args": Namespace(lr=0.1, device="cuda")},
    "averaged": lambda state: {"model_ema": {"n_averaged": torch.tensor(9), **prefixed("module.")(state)}},
    "nested": lambda state: {"state": 1, "ema": {"module": state}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outer", [lambda net: net, lambda net: wrap(net, num_classes=4)], ids=["bare", "wrapped"])
def test_every_form_fits(form: str, outer: Any, tmp_path: Path) -> None:
    source, net = Mine().eval(), outer(Mine()).eval()
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pt")
    assert load_weights(net, tmp_path / "w.pt") == []
    assert torch.equal(net(X), source(X))


def test_another_number_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, net = Mine(21), wrap(Mine(4), num_classes=4)
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    before = net.net.head.weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(VssError, match=r"is of 21 classes and the network of 4 .net.head.weight and .*--replace-head"):
        load_weights(net, tmp_path / "w.pth", classes=4)
    with caplog.at_level(logging.WARNING):
        assert load_weights(net, tmp_path / "w.pth", classes=4, replace_head=True) == [
            "net.head.weight",
            "net.head.bias",
        ]
    assert "7 of its 9 tensors fit; the head starts anew, from 21 classes to 4" in caplog.text
    assert torch.equal(net.net.head.weight, before)  # type: ignore[union-attr, arg-type]
    assert torch.equal(net.net.encoder[0].weight, source.encoder[0].weight)  # type: ignore[union-attr, index]
    torch.save(Mine(4).state_dict(), tmp_path / "w.pth")
    with pytest.raises(VssError, match=r"no head of other classes to replace; leave --replace-head"):
        load_weights(net, tmp_path / "w.pth", classes=4, replace_head=True)
    torch.save({**Mine(4).state_dict(), "encoder.0.weight": torch.zeros(6, 3, 3, 3)}, tmp_path / "w.pth")
    with pytest.raises(VssError, match=r"8 of its 9 tensors fit; it has net.encoder.0.weight of \(6, 3"):
        load_weights(net, tmp_path / "w.pth", classes=4, replace_head=True)


def test_a_cut_checkpoint_gets_a_new_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build("unet", 5, width=8, depth=2).eval()
    small = apply_plan(net, make_plan(net, X))
    vss.save(small, tmp_path / "small.safetensors")
    again = checkpoint.read(tmp_path / "small.safetensors", model=build("unet", 3, width=8, depth=2), replace_head=True)
    assert again.model(X).shape == (1, 3, 32, 32)
    same = [name for name, value in again.model.state_dict().items() if torch.equal(value, small.state_dict()[name])]
    assert len(same) == len(small.state_dict()) - 2
    with pytest.raises(VssError, match="no head of other classes"):
        checkpoint.read(tmp_path / "small.safetensors", model=build("unet", 5, width=8, depth=2), replace_head=True)


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "module.backbone."])
def test_the_backbone_of_a_segmentation_file(prefix: str, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    source, net = resnet18(weights=None), build("resnet18_seg", 3, decoder=8)
    state = {prefix + name: value for name, value in source.state_dict().items() if not name.startswith("fc.")}
    torch.save(state | {"classifier.0.weight": torch.zeros(3, 8, 1, 1)}, tmp_path / "seg.pth")
    load_backbone(net.get_submodule("backbone"), tmp_path / "seg.pth")
    assert torch.equal(net.state_dict()["backbone.stem.0.weight"], source.conv1.weight)
    assert torch.equal(net.state_dict()["backbone.layer4.1.bn2.bias"], source.layer4[1].bn2.bias)


def torchvision_fcn(classes: int, *, aux: bool) -> nn.Module:
    """torchvision's own parts and names, of a ResNet with one block a stage."""
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    features = {"layer4": "out", "layer3": "aux"} if aux else {"layer4": "out"}
    backbone = IntermediateLayerGetter(ResNet(BasicBlock, [1, 1, 1, 1]), features)
    return FCN(backbone, FCNHead(512, classes), FCNHead(256, classes) if aux else None).eval()


@pytest.mark.parametrize("aux", [True, False])
def test_a_torchvision_file_with_an_auxiliary_head(aux: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    source, net = torchvision_fcn(21, aux=True), wrap(torchvision_fcn(4, aux=aux), num_classes=4).eval()
    torch.save({"model": source.state_dict(), "args": Namespace(lr=0.1)}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        head = load_weights(net, tmp_path / "w.pth", classes=4, replace_head=True)
    names = ["classifier.4.weight", "classifier.4.bias"]
    names += ["aux_classifier.4.weight", "aux_classifier.4.bias"] if aux else []
    assert head == [f"net.{name}" for name in names]
    assert ("aux_classifier left out, which the network does not have" in caplog.text) is not aux
    state = source.state_dict()
    for name, value in net.state_dict().items():
        assert name in head or torch.equal(value, state[name.removeprefix("net.")])
    same = wrap(torchvision_fcn(21, aux=aux), num_classes=21).eval()
    assert load_weights(same, tmp_path / "w.pth", classes=21) == []
    assert torch.equal(same(X), source(X)["out"])


def test_a_head_of_the_network_that_a_file_lacks_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision_fcn(4, aux=False).state_dict(), tmp_path / "w.pth")
    with pytest.raises(VssError, match=r"tensors fit; it has no net.aux_classifier.0.weight"):
        load_weights(wrap(torchvision_fcn(4, aux=True), num_classes=4), tmp_path / "w.pth", classes=4)


def test_a_deeper_network_is_not_taken_for_this_one(tmp_path: Path) -> None:
    deep = Mine().state_dict() | {"encoder.3.weight": torch.ones(8, 8, 3, 3)}
    torch.save(deep, tmp_path / "w.pth")
    with pytest.raises(VssError, match=r"9 of its 9 tensors fit; it has encoder.3.weight, which the network does not"):
        load_weights(Mine(), tmp_path / "w.pth", classes=4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_segmentation_models_pytorch(suffix: str, tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    torch.manual_seed(0)
    build_net = lambda classes: smp.Unet("resnet18", encoder_weights=None, classes=classes).eval()  # noqa: E731
    source, net = build_net(21), wrap(build_net(4), num_classes=4)
    if suffix == ".pth":
        torch.save({"state_dict": prefixed("model.")(source.state_dict())}, tmp_path / "w.pth")
    else:
        source.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "w.safetensors")
    head = load_weights(net, tmp_path / f"w{suffix}", classes=4, replace_head=True)
    assert head == ["net.segmentation_head.0.weight", "net.segmentation_head.0.bias"]
    state = source.state_dict()
    assert all(n in head or torch.equal(v, state[n.removeprefix("net.")]) for n, v in net.state_dict().items())
