"""What every surface-defect network here is: one image in, one decision and one coarse defect map out."""

from __future__ import annotations

import torch
from torch import Tensor

from vss.models.base import SegModel


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
