"""Fully convolutional networks (Long et al., 2015) as torchvision builds them: dilated ResNet, one 3x3 head."""

from __future__ import annotations

from vss.models.base import SegModel
from vss.models.registry import MODELS
from vss.models.torchvision_seg import TorchvisionSeg


def _register(depth: int) -> None:
    def factory(num_classes: int, *, aux: bool = True) -> SegModel:
        """ResNet backbone of output stride 8 and a plain head; `aux` adds the head on layer3 for training."""
        from torchvision.models import segmentation

        net = getattr(segmentation, f"fcn_resnet{depth}")
        return TorchvisionSeg(
            net(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=aux), num_classes
        )

    MODELS.add(f"fcn_resnet{depth}", factory)


for _depth in (50, 101):
    _register(_depth)
