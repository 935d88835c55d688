"""SegNet (Badrinarayanan et al., 2017): a VGG16 encoder whose pooling indices guide the decoder's unpooling.

The decoder mirrors the encoder. Pooling indices belong to channels, so the channels of an encoder stage and those of
the decoder tensor that is unpooled with its indices are pruned together (`vss.prune.ties` finds the pairs).
"""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.models.base import SegModel, Width
from vss.models.blocks import conv_bn_relu, init_weights
from vss.models.pooling import max_pool, max_unpool
from vss.models.registry import MODELS

CONVOLUTIONS = (2, 2, 3, 3, 3)  # VGG16, configuration D
WIDENING = (1, 2, 4, 8, 8)


class VGGFeatures(nn.Module):
    """The convolutions of VGG16 with batch norm, under torchvision's own keys (`features.0.weight`).

    (N, 3, H, W) -> the input of each of the five poolings, finest first, and the tensor after the last one.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        cin = 3
        for count, factor in zip(CONVOLUTIONS, WIDENING, strict=True):
            for _ in range(count):
                cout = width * factor
                layers += [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
                cin = cout
            layers.append(nn.MaxPool2d(2))  # a place holder that keeps torchvision's numbering
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, tuple[int, ...]]]]:
        """x: (N, 3, H, W). Returns (N, C5, H//32, W//32), and (indices, size before pooling) of each stage."""
        pooled = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                size = tuple(x.shape)
                x, indices = max_pool(x)
                pooled.append((indices, size))
            else:
                x = layer(x)
        return x, pooled


@MODELS.register("segnet")
class SegNet(SegModel):
    """Encoder and mirrored decoder; inputs of any size from 32x32 on.

    Args:
        num_classes: K.
        width: channels of the first stage; the stages have 1, 2, 4, 8 and 8 times as many (64 as published).
        multiple: what input sides must be multiples of; 32 for one exported graph of many sizes, 1 otherwise.
    """

    dynamic_multiple = 32
    jumps = True

    def __init__(self, num_classes: int, *, width: Width = 64, multiple: PositiveInt = 1) -> None:
        super().__init__(num_classes)
        self.size_multiple = multiple
        self.backbone = VGGFeatures(width)
        widths = [width * factor for factor in WIDENING]
        self.decoder = nn.ModuleList(
            nn.Sequential(*_stage(widths[level], widths[max(level - 1, 0)], CONVOLUTIONS[level] - (level == 0)))
            for level in reversed(range(5))
        )
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)
        init_weights(self)

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W). Returns (N, K, H, W): the head works at full size."""
        x, pooled = self.backbone(x)
        for stage in self.decoder:
            indices, size = pooled.pop()
            x = stage(max_unpool(x, indices, size))
        return self.classifier(x)

    def check_size(self, x: Tensor) -> None:
        """Refuse an input that five poolings would empty, or whose sides are no multiples."""
        super().check_size(x)
        if min(x.shape[-2:]) < 32:
            raise VssError(f"segnet needs at least 32x32 pixels, got {x.shape[-2]}x{x.shape[-1]}.")


def _stage(cin: int, cout: int, count: int) -> list[nn.Sequential]:
    """`count` convolutions of which the last one changes the width."""
    return [conv_bn_relu(cin, cout if index == count - 1 else cin) for index in range(count)]
