"""SegDecNet (Bozic, Tabernik, Skocaj: Mixed supervision for surface-defect detection, Computers in Industry, 2021).

A segmentation part (`volume`, `seg_mask`) gives a defect map at 1/8 of the image; a small extractor and a linear layer
turn it and its features into one decision. Module and parameter names are those of the published checkpoints
(`volume.0.0.weight`, `volume.0.1.scale`), so that these load as they are. The published code leaves out a second
32-channel convolution after the first one by accident; it stays left out, as all published results have it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.models.base import DefectModel, Width

WIDTHS = (32, 64, 64, 64, 1024)
EXTRACTOR = (8, 16, 32)

SCOPES: dict[str, tuple[str, ...]] = {"all": (), "volume": ("seg_mask", "extractor", "fc")}
"""What to give as `keep` of `vss.prune.find_groups` (in a recipe: `prune.keep`): "volume" prunes the nine convolutions
of the segmentation part alone, as every published pruning of this network does; "all" prunes the extractor too."""


class FeatureNorm(nn.Module):
    """Normalise each channel of each image over its positions: scale * (x - mean) / sqrt(std + eps) + bias.

    `std` is the unbiased standard deviation. Dividing by the root of the *standard deviation*, not of the variance, is
    how the network was published: 4 x gives twice the output. Training and evaluation are the same, and maps need two
    positions or more. (N, C, H, W) -> (N, C, H, W).

    Args:
        channels: C.
        eps: added to the standard deviation.
        include_bias: without it `bias` stays zero and is not trained. The published code asks for that in its defect
            map and yet trains the bias there; `SegDecNet` does as it is published.
    """

    channel_params: ClassVar[dict[str, int]] = {"scale": 1, "bias": 1}

    def __init__(self, channels: int, *, eps: float = 1e-3, include_bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1), requires_grad=include_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) with H * W > 1."""
        mean = x.mean(dim=(2, 3), keepdim=True)
        std = x.std(dim=(2, 3), correction=1, keepdim=True)
        return self.scale * ((x - mean) / (std + self.eps).sqrt()) + self.bias


class GradientMultiply(torch.autograd.Function):
    """The identity whose gradient is multiplied by a number; see `gradient_multiply`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Returns x."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Returns factor * gradient."""
        return grads[0] * ctx.factor, None


def gradient_multiply(x: Tensor, factor: float) -> Tensor:
    """x itself, whose gradient will be `factor` times what it was; nothing at all in an exported graph."""
    if torch.compiler.is_exporting():
        return x
    result: Tensor = GradientMultiply.apply(x, factor)
    return result


def conv_block(cin: int, cout: int, kernel: int) -> nn.Sequential:
    """Same-size convolution without bias, FeatureNorm, ReLU."""
    convolution = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, FeatureNorm(cout), nn.ReLU(inplace=True))


class SegDecNet(DefectModel):
    """Decision and defect map of an image whose sides are multiples of 8 (640 x 232 in the publication).

    Attributes:
        gradient_multiplier: of the gradients that the decision sends into the map and its features; 1 lets them pass,
            0 trains the decision on fixed features (the publication's gradient adjustment). Set it while training.

    Args:
        num_classes: 1.
        widths: channels of v1, v2, v3, of v4 to v8 each, and of v9.
    """

    size_multiple = 8
    least_side = 64

    def __init__(self, num_classes: int = 1, *, widths: tuple[Width, Width, Width, Width, Width] = WIDTHS) -> None:
        super().__init__(num_classes)
        c1, c2, c3, c4, c5 = widths
        self.gradient_multiplier = 1.0
        self.volume = nn.Sequential(
            conv_block(3, c1, 5),
            nn.MaxPool2d(2),
            conv_block(c1, c2, 5),
            conv_block(c2, c3, 5),
            conv_block(c3, c4, 5),
            nn.MaxPool2d(2),
            *(conv_block(c4, c4, 5) for _ in range(4)),
            nn.MaxPool2d(2),
            conv_block(c4, c5, 15),
        )
        self.seg_mask = nn.Sequential(nn.Conv2d(c5, 1, 1, bias=False), FeatureNorm(1))
        blocks = [conv_block(cin, cout, 5) for cin, cout in zip((c5 + 1, *EXTRACTOR), EXTRACTOR, strict=False)]
        self.extractor = nn.Sequential(*(layer for block in blocks for layer in (nn.MaxPool2d(2), block)))
        self.fc = nn.Linear(2 * EXTRACTOR[-1] + 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, 3, H, W). Returns decision (N, 1) and seg (N, 1, H/8, W/8), both logits."""
        volume = self.volume(x)
        seg = self.seg_mask(volume)
        factor = self.gradient_multiplier
        features = self.extractor(gradient_multiply(torch.cat([volume, seg], dim=1), factor))
        pooled = [
            features.amax(dim=(2, 3)),
            features.mean(dim=(2, 3)),
            gradient_multiply(seg.amax(dim=(2, 3)), factor),
            gradient_multiply(seg.mean(dim=(2, 3)), factor),
        ]
        return self.fc(torch.cat(pooled, dim=1)), seg

    def check_size(self, x: Tensor) -> None:
        """Refuse sides that are no multiples of 8, and images whose last feature maps would have a single position."""
        super().check_size(x)
        height, width = x.shape[-2:]
        if (height // 64) * (width // 64) < 2:
            raise VssError(
                f"segdecnet needs an image of at least 64x128 pixels, got {height}x{width}: its last maps are 1/64 of "
                "it, and FeatureNorm needs two positions or more; give a larger --input-size (data.size of a recipe)."
            )
