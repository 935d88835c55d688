"""U-Net (Ronneberger et al., 2015) with batch norm and same-size convolutions.

Deviation from the paper: padded convolutions, so that logits have the size of the input, and batch norm after each.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vss.models.base import SegModel, Width, conv_bn_relu, init_weights

Depth = Annotated[int, Field(ge=0, le=8)]
Up = Literal["transpose", "bilinear"]


def double_conv(cin: int, cout: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch norm and ReLU."""
    return nn.Sequential(conv_bn_relu(cin, cout), conv_bn_relu(cout, cout))


class UNet(SegModel):
    """Encoder and decoder with skip concatenations.

    Args:
        num_classes: K.
        width: channels of the first level; level i has width * 2**i.
        depth: number of 2x2 poolings; inputs are multiples of 2**depth.
        up: "transpose" (2x2 transposed convolution, as published) or "bilinear" (resize, then 1x1 convolution).
    """

    def __init__(self, num_classes: int, *, width: Width = 64, depth: Depth = 4, up: Up = "transpose") -> None:
        super().__init__(num_classes)
        self.size_multiple = 2**depth
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(double_conv(cin, cout) for cin, cout in zip([3, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(_up(widths[level + 1], widths[level], up) for level in reversed(range(depth)))
        self.decoder = nn.ModuleList(double_conv(2 * widths[level], widths[level]) for level in reversed(range(depth)))
        self.classifier = nn.Conv2d(width, num_classes, 1)
        init_weights(self)

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W). Returns (N, K, H, W): the head works at full size."""
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], dim=1))
        return self.classifier(x)


def _up(cin: int, cout: int, kind: Up) -> nn.Module:
    if kind == "transpose":
        return nn.ConvTranspose2d(cin, cout, 2, stride=2)
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(cin, cout, 1))
