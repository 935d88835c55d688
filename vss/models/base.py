"""What every segmentation network here is: one tensor in, one tensor out, and a name that rebuilds it."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

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
            of an engine may differ by more than rounding; `vss.deploy.parity` compares accordingly.
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
