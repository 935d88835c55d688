"""LR-ASPP on MobileNetV3 (Howard et al., 2019) from torchvision: depthwise convolutions, squeeze-excite, hard swish."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vss.models.base import SegModel
from vss.models.registry import MODELS


@MODELS.register("lraspp_mobilenet_v3_large")
class LRASPP(SegModel):
    """The state dict has torchvision's keys (`backbone.`, `classifier.`).

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        net: Any = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)
        self.backbone: nn.Module = net.backbone
        self.classifier: nn.Module = net.classifier

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W). Returns (N, K, H/8, W/8), rounded up."""
        return self.classifier(self.backbone(x))
