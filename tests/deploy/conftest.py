"""A small network with everything that makes an export interesting: batch norm, strides, a concat and two resizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.deploy import export

# These run on foreign bindings, in processes that `test_trt_bindings` starts.
collect_ignore = ["bindings"] if importlib.util.find_spec("tensorrt") is None else []


SIZE = (32, 48)


class TinySeg(nn.Module):
    """The interface of SegModel over three convolutions."""

    name, size_multiple = "tiny", 4

    def __init__(self, num_classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.num_classes, self.options = num_classes, {"seed": seed}
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(24, num_classes, 1)
        for norm in (self.first[1], self.second[1]):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2.0)

    def forward_logits(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = F.interpolate(self.second(first), size=first.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([first, second], 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.forward_logits(x), size=x.shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1).to(torch.uint8)


class TinyPreprocess:
    """The interface of vss.data.transforms.Preprocess that deploy uses."""

    mean, std, size, sha256 = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), SIZE, "0" * 64

    def normalise(self, x: Tensor) -> Tensor:
        return (x.float() / 255 - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)


@pytest.fixture
def short_segnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """SegNet of VGG16 with one convolution at most poolings: as many of these, less than half of the nodes."""
    monkeypatch.setattr("vss.models.segnet.CONVOLUTIONS", (2, 1, 1, 1, 1))


@pytest.fixture(scope="session")
def tiny() -> TinySeg:
    return TinySeg().eval()


@pytest.fixture(scope="session")
def tiny_class() -> type[TinySeg]:
    return TinySeg


@pytest.fixture(scope="session")
def preprocess() -> TinyPreprocess:
    return TinyPreprocess()


@pytest.fixture(scope="session")
def exported(tiny: TinySeg, preprocess: TinyPreprocess, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two files, exported once: float logits, and uint8 image to uint8 labels. (path, report) each."""
    folder: Path = tmp_path_factory.mktemp("onnx")
    logits, labels = folder / "logits.onnx", folder / "labels.onnx"
    names = ["road", "sky", "car", "tree", "void"]
    return SimpleNamespace(
        logits=(logits, export(tiny, logits, size=SIZE, class_names=names, plan_sha256="f" * 64)),
        labels=(
            labels,
            export(tiny, labels, size=SIZE, preprocess=preprocess, labels=True, labels_dtype="uint8"),
        ),
    )
