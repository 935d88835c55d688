"""Networks and groups that hand chosen filters or feature maps to a criterion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.prune import Group, Slot, collect, make_criterion
from vss.prune.criteria import Criterion
from vss.prune.stats.base import Stats
from vss.prune.stats.run import Loss


class Filters(nn.Module):
    """Linear layers whose rows are the filters of one group."""

    def __init__(self, *rows: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(row.shape[1], row.shape[0], bias=False) for row in rows)
        for layer, row in zip(self.layers, rows, strict=True):
            layer.weight = nn.Parameter(row.clone())

    def group(self) -> Group:
        slots = tuple(Slot(f"layers.{i}.weight", 0) for i in range(len(self.layers)))
        return Group("layers.0", len(self.layers[0].weight), slots)


def filter_scores(name: str, *rows: Tensor, **options: object) -> Tensor:
    """Raw scores of a criterion that reads weights alone."""
    net = Filters(*rows)
    score = make_criterion(name, **options)(net.group(), Stats(net))
    assert score is not None
    return score


class Feed(nn.Module):
    """Images of C channels pass an identity convolution `a` and are read by `b`: the stream is what was fed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 1, bias=False)
        self.b = nn.Conv2d(channels, 1, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(channels)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def group(self) -> Group:
        slots = (Slot("a.weight", 0), Slot("b.weight", 1, role="consumer"))
        return Group("a", self.a.out_channels, slots)


def fed(need: object, batches: Sequence[Tensor]) -> Tensor:
    """One statistic of chosen maps."""
    net = Feed(batches[0].shape[1]).to(batches[0].dtype)
    collected, _ = collect(net, [net.group()], [need], batches, None)
    return collected[str(need)]["a"]


def fed_scores(criterion: Criterion, batches: Sequence[Tensor]) -> Tensor:
    """Raw scores of chosen maps."""
    net = Feed(batches[0].shape[1])
    return raw_scores(criterion, net, [net.group()], batches, None)["a"]


def raw_scores(
    criterion: Criterion, net: nn.Module, groups: Sequence[Group], batches: Sequence[object], loss: Loss | None
) -> dict[str, Tensor]:
    """Group id -> scores before they are made comparable; groups that the criterion is silent about are left out."""
    collected, _ = collect(net, list(groups), criterion.needs, batches, loss, batch_norm=criterion.batch_norm_mode())
    stats = Stats(net, collected)
    return {group.id: score for group in groups if (score := criterion(group, stats)) is not None}


class FeatureNorm(nn.Module):
    """scale * (x - mean) / sqrt(sd + 1e-3) + bias, by image and channel, sd unbiased."""

    channel_params = {"scale": 1, "bias": 1}  # noqa: RUF012

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        spread = x.std(dim=(2, 3), keepdim=True)
        return self.scale * (x - x.mean(dim=(2, 3), keepdim=True)) / (spread + 1e-3).sqrt() + self.bias


class Mixed(nn.Module):
    """Conv-norm-ReLU with a residual and a concatenation, all in place where a network can be; 3 classes."""

    def __init__(self, width: int = 6, *, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), norm(width)),
                "one": nn.Sequential(nn.Conv2d(width, 5, 3, padding=1, bias=False), norm(5), nn.ReLU(inplace=True)),
                "two": nn.Sequential(nn.Conv2d(5, width, 1, bias=False), norm(width)),
            }
        )
        self.branch = nn.Sequential(nn.Conv2d(width, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(inplace=True))
        self.merge = nn.Sequential(nn.Conv2d(width + 4, 7, 1, bias=False), norm(7), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(7, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.backbone["stem"](x), inplace=True)
        z = self.backbone["two"](self.backbone["one"](y))
        z += y
        z = F.relu(z, inplace=True)
        return self.head(self.merge(torch.cat([z, self.branch(z)], dim=1)))
