"""What every segmentation network here is: one tensor in, one tensor out, and a name that rebuilds it."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vss import ops
from vss.core.errors import VssError

Width = Annotated[int, Field(ge=1, le=8192)]
"""Channels of a layer, as an option."""


class SegModel(nn.Module):
    """Base of all segmentation networks.

    A subclass writes `forward_logits`; one with auxiliary heads also overrides `forward_train`.

    Attributes:
        name, options: what `vss.models.build` was called with, so that a checkpoint can rebuild the network.
        num_classes: K.
        size_multiple: H and W of an input must be multiples of this.
        least_side: least H and W of an input.
        dynamic_multiple: `size_multiple` must be a multiple of this in an export of one graph for many sizes.
        align_corners: the corner rule of the final resize.
        jumps: rounding can move whole values to another pixel (pooling indices at near-ties), so that a few outputs
            of an engine may differ by more than rounding; `vss.deploy.export` compares accordingly.
        task: "segmentation", or "defect" for networks that give a decision and a map (`DefectModel`).
    """

    task: str = "segmentation"
    size_multiple: int = 1
    least_side: int = 32
    dynamic_multiple: int = 1
    align_corners: bool = False
    jumps: bool = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.name = ""
        self.options: dict[str, Any] = {}
        self.num_classes = num_classes

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) float, normalised. Returns (N, K, h, w) logits at the head's own resolution."""
        raise TypeError(f"{type(self).__name__} must define forward_logits")

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) float, normalised. Returns (N, K, H, W) logits."""
        self.check_size(x)
        return self.resize(self.forward_logits(x), x)

    def forward_train(self, x: Tensor) -> dict[str, Tensor]:
        """All heads at full size: `out` and, where the network has one, `aux`. Only `out` is ever exported."""
        return {"out": self(x)}

    def predict(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) float, normalised. Returns (N, H, W) uint8 labels; full-size logits never exist."""
        self.check_size(x)
        return ops.seg_argmax(self.forward_logits(x), tuple(x.shape[-2:]), self.align_corners)

    def resize(self, logits: Tensor, like: Tensor) -> Tensor:
        """Bilinear resize of (N, K, h, w) to the H and W of `like`."""
        if logits.shape[-2:] == like.shape[-2:]:
            return logits
        return F.interpolate(logits, size=like.shape[-2:], mode="bilinear", align_corners=self.align_corners)

    def check_size(self, x: Tensor) -> None:
        """Refuse an input whose H or W is no multiple of `size_multiple`, naming the size to pad to."""
        if self.size_multiple == 1 or torch.compiler.is_exporting():
            return
        height, width = int(x.shape[-2]), int(x.shape[-1])
        check_multiple(self.name or type(self).__name__, (height, width), self.size_multiple)


def check_multiple(name: str, size: tuple[int, int], multiple: int) -> None:
    """Raise when `size` (H, W) is no multiple of what network `name` needs."""
    height, width = size
    if height % multiple or width % multiple:
        up = [-(-side // multiple) * multiple for side in size]
        raise VssError(
            f"{name} needs an input height and width that are multiples of {multiple}, got {height}x{width}; "
            f"give --input-size {up[0]},{up[1]} (data.size of a recipe)."
        )


# The few layers that several networks share.


def conv_bn_relu(cin: int, cout: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Same-size convolution, batch norm, ReLU: (N, cin, H, W) -> (N, cout, H/stride, W/stride)."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, stride=stride, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
    )


def init_weights(module: nn.Module) -> None:
    """He-normal convolutions (fan out, ReLU), unit batch norms; for networks trained from scratch."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm) and layer.affine:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


# What every surface-defect network here is: one image in, one decision and one coarse defect map out.


class DefectModel(SegModel):
    """Base of networks that decide whether an image shows a defect, and where.

    A subclass writes `forward_heads`. `forward` gives its pair: both are logits, the map stays at the network's own
    resolution, as it is trained, exported and published.

    Attributes:
        stride: H / h and W / w of the map; it divides `size_multiple`.
    """

    task = "defect"
    stride: int = 8

    def __init__(self, num_classes: int = 1) -> None:
        if num_classes != 1:
            raise ValueError(f"a defect network has one class, the defect; got num_classes {num_classes}")
        super().__init__(1)

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, 3, H, W) float, normalised. Returns logits (N, 1) and (N, 1, h, w)."""
        raise TypeError(f"{type(self).__name__} must define forward_heads")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x: (N, 3, H, W) float, normalised. Returns decision (N, 1) and seg (N, 1, h, w), logits."""
        self.check_size(x)
        return self.forward_heads(x)

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W). Returns the defect map alone: (N, 1, h, w) logits."""
        return self.forward_heads(x)[1]

    def forward_train(self, x: Tensor) -> dict[str, Tensor]:
        """Both heads by name: `decision` (N, 1) and `seg` (N, 1, h, w), logits."""
        decision, seg = self(x)
        return {"decision": decision, "seg": seg}

    def predict(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) float, normalised. Returns (N, H, W) uint8: 1 where the resized map is at least 0."""
        self.check_size(x)
        return (self.resize(self.forward_logits(x), x) >= 0).squeeze(1).to(torch.uint8)


class AtMost(TorchDispatchMode):
    """Within it, tensors of at most so many elements altogether are made; more is a `VssError` before the memory is
    taken. For networks whose options came in a file.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.left = elements

    def __torch_dispatch__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first = func._schema.arguments[0].name if func._schema.arguments else ""
        if first == "size":
            self.left -= math.prod(args[0])
            if self.left < 0:
                raise VssError("its tensors would be larger than those in the file")
        return func(*args, **(kwargs or {}))
