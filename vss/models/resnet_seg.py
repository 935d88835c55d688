"""ResNet backbones of torchvision as feature pyramids, their weights from a file, and a light top-down decoder on them.

The decoder (lateral 1x1 convolutions, addition, one 3x3 convolution) is the top-down pathway of feature pyramid
networks (Lin et al., 2017) narrowed to one output level of stride 4; the backbone may be dilated.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.errors import VssError, one_line
from vss.core.files import require_file
from vss.models.base import SegModel, Width, conv_bn_relu, init_weights

DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    ArithmeticError, AssertionError, MemoryError, struct.error, ImportError,
)  # fmt: skip
STAGES = ("layer1", "layer2", "layer3", "layer4")


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


def load_backbone(backbone: nn.Module, path: Path | str) -> None:
    """Load local ImageNet weights in the layout of torchvision's classifiers into a backbone; the head is left out.

    Fits every backbone here: `ResNetFeatures`, torchvision's own `IntermediateLayerGetter` around a ResNet or a
    MobileNet, and SegNet's VGG. `path` is a .safetensors, .pt or .pth file; pickles of code are refused
    (`weights_only=True`).
    """
    own = backbone.state_dict()
    state = {
        _backbone_key(key, own): value
        for key, value in read_state_dict(path).items()
        if not key.startswith(("fc.", "classifier."))
    }
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise VssError(f"{path} does not fit this backbone: {one_line(str(error))}.") from error


def _backbone_key(key: str, own: dict[str, Tensor]) -> str:
    """torchvision's name of a tensor in the names of a backbone with the tensors `own`."""
    if "stem.0.weight" in own:
        for old, new in {"conv1.": "stem.0.", "bn1.": "stem.1."}.items():
            if key.startswith(old):
                return new + key[len(old) :]
    if not any(name.startswith("features.") for name in own):
        return key.removeprefix("features.")
    return key


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read a flat state dict from safetensors or from a torch file, never running code from it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = require_file(path, kind="weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise VssError(f"{path} is truncated or no safetensors file ({error}); copy it again.") from error
    except DAMAGED as error:  # what torch's reader is led to by damaged bytes; it has no common class for them
        reason = one_line((str(error) or type(error).__name__).splitlines()[0])
        raise VssError(
            f"{path} cannot be read as weights alone ({reason}); expected a state dict saved by "
            "torch.save or safetensors: re-save model.state_dict() from the code that made it."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise VssError(f"{path} holds no state dict of tensors; re-save model.state_dict() from the code that made it.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _plain(value: object) -> bool:
    """A dense tensor whose numbers are there."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


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
