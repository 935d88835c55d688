"""A user's package: one network of their own, with a norm layer and a coupling of their own, registered by import."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vss.models import MODELS, SegModel


class ChannelScale(nn.Module):
    """x * gain + shift, one value of each per channel; vss learns of the channels from `channel_params`."""

    channel_params: ClassVar[dict[str, int]] = {"gain": 0, "shift": 0}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, channels))
        self.shift = nn.Parameter(torch.linspace(-0.1, 0.1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x * self.gain[:, None, None] + self.shift[:, None, None]


class Swap(torch.autograd.Function):
    """max(a, b) of two maps, in a function whose gradient hides `b` from any dependency graph."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        """Returns the larger value of each pair."""
        return torch.maximum(a, b)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of `a` alone."""
        return grads[0], None


@MODELS.register("example_net")
class ExampleNet(SegModel):
    """Two branches that meet in a custom function, then a head."""

    ties: ClassVar[list[tuple[str, str]]] = [("left", "right")]

    def __init__(self, num_classes: int, *, width: int = 16) -> None:
        super().__init__(num_classes)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), ChannelScale(width), nn.ReLU())
        self.left = nn.Conv2d(width, width, 3, padding=1)
        self.right = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(2 * width, num_classes, 1)

    def forward_logits(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K, H, W)."""
        x = self.stem(x)
        left, right = self.left(x), self.right(x)
        return self.head(torch.cat([Swap.apply(left, right.detach()), right], dim=1))
