"""ResNet backbone with a light top-down decoder (lateral 1x1 convolutions, addition, one 3x3 convolution).

The decoder is the top-down pathway of feature pyramid networks (Lin et al., 2017) narrowed to one output level of
stride 4; torchvision's ResNets carry the backbone, optionally dilated.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vss.models.backbones import ResNetFeatures
from vss.models.base import MODELS, SegModel, Width, conv_bn_relu, init_weights


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


def _register(depth: int) -> None:
    # `build` validates options by signature, so the basic-block nets do not offer the dilation they cannot have.
    if depth < 50:

        def factory(num_classes: int, *, decoder: Width = 128) -> SegModel:
            return ResNetSeg(num_classes, depth=depth, decoder=decoder)
    else:

        def factory(  # type: ignore[misc]
            num_classes: int, *, decoder: Width = 128, dilate: tuple[bool, bool, bool] = (False, False, False)
        ) -> SegModel:
            return ResNetSeg(num_classes, depth=depth, decoder=decoder, dilate=dilate)

    MODELS.add(f"resnet{depth}_seg", factory)


for _depth in (18, 34, 50, 101):
    _register(_depth)
