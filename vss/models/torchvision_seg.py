"""torchvision's segmentation networks as `SegModel`: same parts, same names, so that its weights load as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vss.models.base import SegModel


class TorchvisionSeg(SegModel):
    """A backbone that gives named features, a head on `out` and, where there is one, an auxiliary head on `aux`.

    The state dict has torchvision's keys (`backbone.`, `classifier.`, `aux_classifier.`). In training mode DeepLabV3
    needs two images or more, since its image pooling ends in a batch norm over 1x1 maps.

    Args:
        net: torchvision's network, built without download.
        num_classes: K.
    """

    def __init__(self, net: Any, num_classes: int) -> None:
        super().__init__(num_classes)
        self.backbone: nn.Module = net.backbone
        self.classifier: nn.Module = net.classifier
        self.aux_classifier: nn.Module | None = getattr(net, "aux_classifier", None)

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W). Returns (N, K, H/8, W/8), rounded up."""
        return self.classifier(self.backbone(x)["out"])

    def forward_train(self, x: Tensor) -> dict[str, Tensor]:
        """`out` and, where the network has the head, `aux`, each (N, K, H, W)."""
        features = self.backbone(x)
        heads = {"out": self.resize(self.classifier(features["out"]), x)}
        if self.aux_classifier is not None:
            heads["aux"] = self.resize(self.aux_classifier(features["aux"]), x)
        return heads
