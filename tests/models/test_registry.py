"""build: names, options and their sentences."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from vss import models
from vss.core.errors import VssError
from vss.models import MODELS, SegModel


def test_a_network_remembers_how_to_be_built_again() -> None:
    net = models.build("unet", 7, width=4, depth=2)
    assert (net.name, net.num_classes, net.options) == ("unet", 7, {"width": 4, "depth": 2})
    again = models.build(net.name, net.num_classes, **net.options)
    ours, theirs = net.state_dict(), again.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("name", "classes", "options", "sentence"),
    [
        ("unett", 5, {}, r"unknown model 'unett'\. Did you mean 'unet'\?"),
        ("unet", 5, {"widht": 4}, r"unknown option of model 'unet' 'widht'\. Did you mean 'width'\?"),
        ("resnet18_seg", 5, {"dilate": (True,) * 3}, "unknown option of model 'resnet18_seg' 'dilate'"),
        ("unet", 0, {}, "num_classes is 0; expected 1 to 256, since labels are uint8"),
        ("unet", 257, {}, "num_classes is 257"),
        ("unet", 5, {"up": "nearest"}, "unknown up of model 'unet' 'nearest'\\. Did you mean 'bilinear'"),
        ("unet", 5, {"up": 3}, "unknown up of model 'unet' '3'"),
        ("unet", 5, {"width": -4}, "option width of model 'unet' is -4; .* greater than or equal to 1"),
        ("unet", 5, {"width": "wide"}, "option width of model 'unet' is 'wide'; Input should be a valid integer"),
        ("unet", 5, {"width": "8"}, "option width of model 'unet' is '8'; Input should be a valid integer"),
        ("unet", 5, {"width": True}, "option width of model 'unet' is True; Input should be a valid integer"),
        ("unet", 5, {"width": 8.5}, "option width of model 'unet' is 8.5; Input should be a valid integer"),
        ("unet", 5, {"depth": 40}, "option depth of model 'unet' is 40; .* less than or equal to 8"),
        ("resnet50_seg", 5, {"dilate": (True,)}, r"option dilate\[1\] of model 'resnet50_seg' is .*required"),
        ("segdecnet", 1, {"widths": [8, 8, 8, 0, 8]}, r"option widths\[3\] of model 'segdecnet' is 0; .*equal to 1"),
        ("fcn_resnet50", 5, {"aux": 1}, "option aux of model 'fcn_resnet50' is 1; Input should be a valid boolean"),
    ],
)
def test_bad_names_and_options_are_sentences(name: str, classes: int, options: dict, sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        models.build(name, classes, **options)


def test_a_users_own_network_is_built_under_its_canonical_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(SegModel):
        def __init__(self, num_classes: int, *, hidden: int = 3) -> None:
            super().__init__(num_classes)
            self.net = nn.Sequential(nn.Conv2d(3, hidden, 1), nn.Conv2d(hidden, num_classes, 1))

        def forward_logits(self, x: Tensor) -> Tensor:
            return self.net(x)

    monkeypatch.setattr(MODELS, "_items", dict(MODELS._items))
    monkeypatch.setattr(MODELS, "_aliases", dict(MODELS._aliases))
    MODELS.add("mine", Mine, aliases=["my_net"])
    net = models.build("my_net", 4, hidden=2)
    assert (net.name, net.options) == ("mine", {"hidden": 2})
    assert net(torch.zeros(1, 3, 5, 5)).shape == (1, 4, 5, 5)


def test_options_of_a_users_own_network_are_checked_by_its_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(num_classes: int, *, name: str = "x", rate: Annotated[float, Field(gt=0)] = 1.0, free=3) -> SegModel:
        return models.build("unet", num_classes, width=2, depth=1)

    monkeypatch.setattr(MODELS, "_items", dict(MODELS._items))
    MODELS.add("own", factory)
    assert models.build("own", 2, rate=1, name="y", free=object()).options["rate"] == 1.0
    for bad in ("1", -1.0, float("nan"), float("inf"), True, None):
        with pytest.raises(VssError, match=r"option rate of model 'own' is .*; Input should be"):
            models.build("own", 2, rate=bad)
