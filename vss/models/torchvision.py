"""torchvision's segmentation networks as `SegModel`, and a light top-down decoder on its ResNets.

The former have the same parts and names, so that its weights load as they are. The decoder (lateral 1x1 convolutions,
addition, one 3x3 convolution) is the top-down pathway of feature pyramid networks (Lin et al., 2017) narrowed to one
output level of stride 4; the backbone may be dilated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vss.models.base import SegModel, Width, conv_bn_relu, init_weights

STAGES = ("layer1", "layer2", "layer3", "layer4")


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


# ResNet backbones as feature pyramids, and the decoder on them.


class ResNetFeatures(nn.Module):
    """A torchvision ResNet without its classifier.

    (N, 3, H, W) -> [(N, C1, H/4, W/4), (N, C2, H/8, ..), (N, C3, H/16, ..), (N, C4, H/32, ..)]; strides 2 of the last
    stages turn into dilation where `dilate` says so, in the order (layer2, layer3, layer4).
    """

    def __init__(self, depth: int, *, dilate: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        from torchvision.models import resnet

        if depth < 50 and any(dilate):
            raise ValueError(f"ResNet-{depth} has basic blocks, which torchvision does not dilate; leave dilate off")
        factory = getattr(resnet, f"resnet{depth}")
        options = {"replace_stride_with_dilation": list(dilate)} if any(dilate) else {}
        net = factory(weights=None, **options)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        for stage in STAGES:
            setattr(self, stage, getattr(net, stage))
        expansion = 1 if depth < 50 else 4
        self.channels = [width * expansion for width in (64, 128, 256, 512)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (N, 3, H, W). Returns the four stage outputs, finest first."""
        x = self.stem(x)
        features = []
        for stage in STAGES:
            x = getattr(self, stage)(x)
            features.append(x)
        return features


class ResNetSeg(SegModel):
    """Segmentation on four ResNet stages.

    Args:
        num_classes: K.
        depth: 18, 34, 50 or 101.
        decoder: width of the top-down path.
        dilate: replace the stride by dilation in (layer2, layer3, layer4); ResNet-50 and deeper.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int,
        decoder: Width = 128,
        dilate: tuple[bool, bool, bool] = (False, False, False),
    ) -> None:
        super().__init__(num_classes)
        self.backbone = ResNetFeatures(depth, dilate=dilate)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, decoder, 1, bias=False), nn.BatchNorm2d(decoder))
            for channels in self.backbone.channels
        )
        self.fuse = conv_bn_relu(decoder, decoder)
        self.classifier = nn.Conv2d(decoder, num_classes, 1)
        for part in (self.lateral, self.fuse, self.classifier):
            init_weights(part)

    def forward_logits(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W). Returns (N, K, H/4, W/4)."""
        features = self.backbone(x)
        top = self.lateral[-1](features[-1])
        for lateral, feature in zip(list(self.lateral)[-2::-1], features[-2::-1], strict=True):
            side = lateral(feature)
            if top.shape[-2:] != side.shape[-2:]:
                top = F.interpolate(top, size=side.shape[-2:], mode="bilinear", align_corners=False)
            top = side + top
        return self.classifier(self.fuse(F.relu(top)))


# `build` validates options by signature, so the basic-block nets do not offer the dilation they cannot have.


def _basic(depth: int) -> Callable[..., SegModel]:
    def factory(num_classes: int, *, decoder: Width = 128) -> SegModel:
        return ResNetSeg(num_classes, depth=depth, decoder=decoder)

    return factory


def _bottleneck(depth: int) -> Callable[..., SegModel]:
    def factory(
        num_classes: int, *, decoder: Width = 128, dilate: tuple[bool, bool, bool] = (False, False, False)
    ) -> SegModel:
        return ResNetSeg(num_classes, depth=depth, decoder=decoder, dilate=dilate)

    return factory


resnet18_seg, resnet34_seg = _basic(18), _basic(34)
resnet50_seg, resnet101_seg = _bottleneck(50), _bottleneck(101)
