"""torchvision's segmentation networks as `SegModel`: same parts, same names, so that its weights load as they are."""

from __future__ import annotations

from collections.abc import Callable
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


def _with_aux(name: str) -> Callable[..., SegModel]:
    def factory(num_classes: int, *, aux: bool = True) -> SegModel:
        """ResNet backbone of output stride 8; `aux` adds the head on layer3 for training."""
        from torchvision.models import segmentation

        build = getattr(segmentation, name)
        net = build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux)
        return TorchvisionSeg(net, num_classes)

    return factory


# DeepLabV3 (Chen et al., 2017): atrous spatial pyramid pooling, with the auxiliary head that it was trained with.
deeplabv3_resnet50, deeplabv3_resnet101 = _with_aux("deeplabv3_resnet50"), _with_aux("deeplabv3_resnet101")

# Fully convolutional networks (Long et al., 2015) as torchvision builds them: dilated ResNet, one 3x3 head.
fcn_resnet50, fcn_resnet101 = _with_aux("fcn_resnet50"), _with_aux("fcn_resnet101")


# LR-ASPP on MobileNetV3 (Howard et al., 2019) from torchvision: depthwise convolutions, squeeze-excite, hard swish.


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
