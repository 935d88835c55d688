"""Weights that something else has trained: whatever a file has around them, they fit whole, but for the head."""

from __future__ import annotations

import logging
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
