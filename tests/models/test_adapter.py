"""wrap: networks of other libraries and of users, from plan to file, with no change to vss."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import vss
from tests.prune.nets import few_blocks
from vss.core.errors import VssError
from vss.deploy import export
from vss.models import SegModel, build, wrap
from vss.prune import apply_plan, make_plan, verify


class Encoder(nn.Module):
    """Feature pyramid in the manner of segmentation_models.pytorch: a list, finest first, the image included."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 12, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features


class Decoder(nn.Module):
    """Upsample, concatenate the skip, convolve."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ((16 + 12, 12), (12 + 8, 8))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for block, skip in zip(self.blocks, features[-2:0:-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1))
        return x


class SmpLike(nn.Module):
    """encoder, decoder, segmentation_head, as that library names them; the head upsamples to the image's size."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(8, classes, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.segmentation_head(self.decoder(self.encoder(x)))


class Heads(nn.Module):
    """One convolution and two heads, given back as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, nn.Conv2d(3, 8, 3, padding=1)
        self.main, self.second, self.scalar = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.body(x))
        main, second, scalar = self.main(x), self.second(F.avg_pool2d(x, 2)), self.scalar(x.mean(dim=(2, 3)))
        results: dict[str, Any] = {
            "dict": OrderedDict(aux=second, out=main),
            "tuple": (main, second, scalar),
            "other": {"masks": main, "deep": second},
            "list": [second, main],
            "text": "no tensor",
        }
        return results[self.kind]


def lraspp() -> nn.Module:
    torch.manual_seed(1)
    with few_blocks():
        return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def smp_like() -> nn.Module:
    torch.manual_seed(1)
    return SmpLike(5)


@pytest.mark.parametrize(("factory", "multiple"), [(lraspp, 1), (smp_like, 8)])
def test_foreign_networks_are_pruned_saved_reloaded_and_exported(factory: Any, multiple: int, tmp_path: Path) -> None:
    model = wrap(factory(), num_classes=5, size_multiple=multiple).eval()
    plan = make_plan(model, torch.zeros(1, 3, 64, 64), budget={"kind": "macs", "keep": 0.5})
    assert 0.45 < plan.cost_after["macs"] / plan.cost_before["macs"] <= 0.5
    small = apply_plan(model, plan)
    assert verify(model, small, plan, [(64, 64), (96, 64)])["masked_max_rel"] < 1e-4
    vss.save(small, tmp_path / "small.safetensors")
    again = vss.load(tmp_path / "small.safetensors", model=wrap(factory(), num_classes=5, size_multiple=multiple))
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in again.state_dict().items())
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(again(x), small(x)) and again(x).shape == (2, 5, 64, 96)
        assert again.predict(x).shape == (2, 64, 96)
    report = export(again, tmp_path / "small.onnx", size=(64, 64), parity_batches=(1, 2))
    assert report["parity"]["max_rel"] < 1e-4 and report["outputs"]["logits"]["shape"] == ["batch", 5, 64, 64]


def test_the_wrapper_says_what_the_network_says() -> None:
    net = lraspp().eval()
    model = wrap(net, num_classes=5)
    x = torch.randn(1, 3, 64, 72, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(model(x), net(x)["out"])
    assert (model.name, model.options, model.num_classes, model.size_multiple) == ("lraspp", {}, 5, 1)
    assert wrap(lraspp(), num_classes=5, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("kind", "output", "names"),
    [
        ("dict", None, ["out", "aux"]),
        ("tuple", None, ["out", "aux1"]),
        ("other", "masks", ["out", "deep"]),
        ("other", None, ["out", "deep"]),
        ("list", 1, ["out", "aux0"]),
    ],
)
def test_heads_of_every_container(kind: str, output: str | int | None, names: list[str]) -> None:
    net = Heads(kind)
    model = wrap(net, num_classes=4, output=output)
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    heads = model.forward_train(x)
    assert list(heads) == names
    assert [tuple(value.shape) for value in heads.values()] == [(2, 4, 12, 16), (2, 6, 12, 16)]
    assert torch.equal(model(x), net.main(F.relu(net.body(x))))


def test_wrong_requests_are_sentences() -> None:
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(VssError, match=r"gives a main output \(1, 6, 8, 8\), expected \(N, 4, h, w\)"):
        wrap(Heads("list"), num_classes=4)(x)
    with pytest.raises(VssError, match="has no output map 'mask'; it gives 'masks', 'deep'"):
        wrap(Heads("other"), num_classes=4, output="mask")(x)
    with pytest.raises(VssError, match="returns a str"):
        wrap(Heads("text"), num_classes=4)(x)
    with pytest.raises(VssError, match="expected 1 to 256"):
        wrap(Heads("dict"), num_classes=0)
    with pytest.raises(VssError, match="size_multiple is 0"):
        wrap(Heads("dict"), num_classes=4, size_multiple=0)
    with pytest.raises(VssError, match="is a SegModel already"):
        wrap(build("unet", 3, width=4, depth=1), num_classes=3)
    with pytest.raises(VssError, match="multiples of 8, got 12x16"):
        wrap(smp_like(), num_classes=5, size_multiple=8)(torch.zeros(1, 3, 12, 16))


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    vss.save(wrap(smp_like(), num_classes=5), tmp_path / "net.safetensors")
    with pytest.raises(VssError, match="holds a 'SmpLike' and was to be loaded into a 'LRASPP'"):
        vss.load(tmp_path / "net.safetensors", model=wrap(lraspp(), num_classes=5))
    with pytest.raises(VssError, match="'smplike', which is not registered; give an unpruned instance"):
        vss.load(tmp_path / "net.safetensors")


def test_segmentation_models_pytorch(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")

    def fresh() -> SegModel:
        return wrap(smp.Unet("resnet18", encoder_weights=None, classes=5), num_classes=5, size_multiple=32)

    model = fresh().eval()
    plan = make_plan(model, torch.zeros(1, 3, 64, 64))
    small = apply_plan(model, plan)
    assert verify(model, small, plan, [(64, 64), (96, 64)])["masked_max_rel"] < 1e-4
    vss.save(small, tmp_path / "small.safetensors")
    again = vss.load(tmp_path / "small.safetensors", model=fresh())
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in again.state_dict().items())
