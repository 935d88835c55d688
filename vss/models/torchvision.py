"""torchvision's segmentation networks as `SegModel`: same parts, same names, so that its weights load as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vss.models.base import MODELS, SegModel


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


# DeepLabV3 (Chen et al., 2017) from torchvision, with the auxiliary head on layer3 that it was trained with.


def _register(depth: int) -> None:
    def factory(num_classes: int, *, aux: bool = True) -> SegModel:
        """ResNet backbone of output stride 8, atrous spatial pyramid pooling; `aux` adds the head for training."""
        from torchvision.models import segmentation

        net = getattr(segmentation, f"deeplabv3_resnet{depth}")
        return TorchvisionSeg(
            net(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux), num_classes
        )

    MODELS.add(f"deeplabv3_resnet{depth}", factory)


for _depth in (50, 101):
    _register(_depth)


# Fully convolutional networks (Long et al., 2015) as torchvision builds them: dilated ResNet, one 3x3 head.


def _register_fcn(depth: int) -> None:
    def factory(num_classes: int, *, aux: bool = True) -> SegModel:
        """ResNet backbone of output stride 8 and a plain head; `aux` adds the head on layer3 for training."""
        from torchvision.models import segmentation

        net = getattr(segmentation, f"fcn_resnet{depth}")
        return TorchvisionSeg(
            net(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux), num_classes
        )

    MODELS.add(f"fcn_resnet{depth}", factory)


for _depth in (50, 101):
    _register_fcn(_depth)


# LR-ASPP on MobileNetV3 (Howard et al., 2019) from torchvision: depthwise convolutions, squeeze-excite, hard swish.


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
