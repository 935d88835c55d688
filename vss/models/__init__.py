"""Networks by name: `build("unet", num_classes=11, width=16)`. A new network is one file here and no other change."""

from vss.models import resnet_seg, unet  # noqa: F401  (registers)
from vss.models.backbones import load_backbone, read_state_dict
from vss.models.base import SegModel, check_multiple
from vss.models.registry import MODELS, build

__all__ = ["MODELS", "SegModel", "build", "check_multiple", "load_backbone", "read_state_dict"]
