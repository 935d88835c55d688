"""Small networks, each with one thing that makes grouping hard, and the proof of a cut of any."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenetv3, resnet

from vss import models
from vss.prune import Groups, Plan, apply_plan, make_plan, verify

HALF = {"kind": "channels", "keep": 0.5, "scope": "local"}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norm layers uneven weights and statistics, so that no test passes by symmetry; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


@contextlib.contextmanager
def few_blocks() -> Iterator[None]:
    """Every kind of layer in less than half of the time: torchvision's ResNet-50 has two blocks in its first stage, of
    which the second is without a downsample, and one in the others, not 3, 4, 6 and 3; of the 15 blocks of its large
    MobileNetV3 are left the 5 that change the width and the first of each two that do not."""
    conf = mobilenetv3._mobilenet_v3_conf

    def resnet50(weights: None = None, **options: Any) -> resnet.ResNet:
        return resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], **options)

    def few(arch: str, **options: Any) -> tuple[list[Any], int]:
        blocks, _ = conf(arch, **options)
        return [blocks[number] for number in (0, 1, 3, 4, 6, 10, 12)], 80  # of the classifier, which is left off

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mobilenetv3, "_mobilenet_v3_conf", few)
        for module in ("resnet", "segmentation.deeplabv3", "segmentation.fcn"):
            patch.setattr(f"torchvision.models.{module}.resnet50", resnet50)
        yield


def short_resnet50_seg() -> nn.Module:
    with few_blocks():
        return models.build("resnet50_seg", 5, decoder=8)


class Chain(nn.Module):
    """conv a -> `middle` (width to width) -> conv b -> conv head."""

    def __init__(self, middle: nn.Module | None = None, *, width: int = 8, inner: int = 6, after: int = 0) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle or nn.ReLU()
        self.b = nn.Conv2d(after or width, inner, 1)
        self.head = nn.Conv2d(inner, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.middle(self.a(x)))))


class Shuffle(nn.Module):
    """The channel shuffle of ShuffleNet, written with reshapes."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Swap(nn.Module):
    """Neighbours change places, which keeping a prefix of the channels would not show."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, c // 2, 2, h, w).flip(2).reshape(n, c, h, w)


class Reorder(nn.Module):
    """A fixed permutation by index."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, [3, 1, 0, 2, 7, 5, 6, 4]]


class BufferScale(nn.Module):
    """Channels times a buffer, which no dependency graph follows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Concat(nn.Module):
    """cat(a, b(a)) through one batch norm into the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.head(F.relu(self.norm(torch.cat([y, self.b(y)], 1))))


class FlattenLinear(nn.Module):
    """conv -> 2x3 pool -> flatten -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(24, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(F.adaptive_avg_pool2d(F.relu(self.a(x)), (2, 3)).flatten(1))))


class MaxAvg(nn.Module):
    """Max and mean pooled side by side into a linear layer, as in SegDecNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(torch.cat([y.amax((2, 3)), y.mean((2, 3))], 1))


class Twice(nn.Module):
    """A shared block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.shared = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(F.relu(self.a(x)))))


class Heads(nn.Module):
    """A main head behind a resize and an auxiliary head, in a nested dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.b = nn.Conv2d(6, 5, 1)
        self.head = nn.Conv2d(5, 2, 1)
        self.side = nn.Conv2d(6, 4, 1)
        self.aux = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        y = self.a(x)
        out = F.interpolate(self.head(F.relu(self.b(y))), size=x.shape[-2:], mode="bilinear")
        return {"out": out, "aux": [F.interpolate(self.aux(F.relu(self.side(y))), scale_factor=2.0)]}


class Residual(nn.Module):
    """Stem and two convolutions added, all with batch norm: one group with three members, and one inside."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.one = nn.Sequential(nn.Conv2d(width, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(5, width, 1, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.head(F.relu(y + self.two(self.one(y))))


class Unfolded(nn.Module):
    """Windows of three by three as channels, read by a linear layer at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(72, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(F.relu(self.a(x)), 3, padding=1).transpose(1, 2)
        return self.head(F.relu(self.fc(windows))).transpose(1, 2).unflatten(2, x.shape[-2:])


def around(block: nn.Module) -> nn.Module:
    head = [nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), block, *head).eval()


def proven(
    net: nn.Module, example: Any, budget: dict[str, Any] | None = None, **options: Any
) -> tuple[Plan, nn.Module]:
    """Plan, cut, and prove the cut on the example."""
    plan = make_plan(net, example, budget=budget or HALF, **options)
    small = apply_plan(net, plan)
    assert verify(net, small, plan, example=example, **options)["masked_max_rel"] < 1e-4
    return plan, small


def reasons(groups: Groups) -> dict[str, str]:
    return {lock.layer: lock.reason for lock in groups.locked}
