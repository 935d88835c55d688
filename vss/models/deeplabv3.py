"""DeepLabV3 (Chen et al., 2017) from torchvision, with the auxiliary head on layer3 that it was trained with."""

from __future__ import annotations

from vss.models.base import SegModel
from vss.models.registry import MODELS
from vss.models.torchvision_seg import TorchvisionSeg


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
