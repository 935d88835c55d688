"""2x2 max pooling that remembers where its maxima were, and the unpooling that puts them back.

In torch both use flat int32 indices (`vss.ops.max_pool_indices`), which TensorRT cannot import (MaxPool with Indices,
MaxUnpool, Scatter). While a network is being exported the same values come from plain operators: the position of a
maximum inside its 2x2 window is an ArgMax over the four phases of the image, and unpooling writes each value to its
phase and zero to the other three. The two forms agree exactly, ties included, at even and odd sizes (the last row or
column of an odd size is in no window).
One graph for many sizes needs sides that are always even here, since the exporter cannot express the cut of an odd one:
a network that uses this sets `SegModel.dynamic_multiple`. With `vss.ops.onnx_nodes.plugin_nodes` an export gets the
nodes VssMaxPool and VssMaxUnpool instead.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vss import ops
from vss.core.errors import VssError
from vss.models.base import SegModel, Width, conv_bn_relu, init_weights
from vss.ops import onnx_nodes


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (N, C, H, W) float. Returns the maxima (N, C, H//2, W//2) and what `max_unpool` needs, of the same shape."""
    if onnx_nodes.writes_nodes():
        return onnx_nodes.max_pool_node(x)
    if torch.compiler.is_exporting():
        return max_pool_phases(x)
    if x.dtype == torch.float64:  # the op has none; torch's indices are int64, by which `max_unpool` knows them
        return F.max_pool2d(x, 2, stride=2, return_indices=True)
    return ops.max_pool_indices(x)


def max_unpool(x: Tensor, indices: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Put (N, C, h, w) values back to where `max_pool` found its maxima; zero elsewhere.

    `size` is that of the pooled tensor; its last two entries H and W count: H//2 == h, W//2 == w.
    """
    if onnx_nodes.writes_nodes():
        return onnx_nodes.max_unpool_node(x, indices, size)
    if torch.compiler.is_exporting():
        return max_unpool_phases(x, indices, size)
    sides = [int(side) for side in size[-2:]]
    if indices.dtype == torch.int64:
        return F.max_unpool2d(x, indices, (2, 2), stride=(2, 2), output_size=sides)
    return ops.max_unpool(x, indices, sides)


def max_pool_phases(x: Tensor) -> tuple[Tensor, Tensor]:
    """`max_pool` by plain operators; the second result is the phase 2*row + column of each maximum, int64 in 0..3."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    even = x[..., : 2 * height, : 2 * width]
    phases = F.pixel_unshuffle(even, 2).reshape(x.shape[0], x.shape[1], 4, height, width)
    return F.max_pool2d(x, 2, stride=2), phases.argmax(dim=2)


def max_unpool_phases(x: Tensor, phase: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """`max_unpool` by plain operators, from what `max_pool_phases` returned."""
    count, channels, height, width = x.shape
    here = phase.unsqueeze(2) == torch.arange(4, device=x.device).reshape(1, 1, 4, 1, 1)
    phases = torch.where(here, x.unsqueeze(2), torch.zeros((), dtype=x.dtype, device=x.device))
    even = F.pixel_shuffle(phases.reshape(count, 4 * channels, height, width), 2)
    rows, columns = size[-2] - 2 * height, size[-1] - 2 * width
    return F.pad(even, (0, columns, 0, rows)) if rows or columns else even


# SegNet (Badrinarayanan et al., 2017): a VGG16 encoder whose pooling indices guide the decoder's unpooling.


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
