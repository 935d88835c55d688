"""Networks by name: `build("unet", num_classes=11, width=16)`. A new network is one file here and no other change.

A network that is not here takes part by `wrap(module, num_classes=...)`, or under a name of its own from a user's
package (`MODELS.register`, see `vss.core.registry`).
"""

from vss.models import resnet_seg, segdecnet, segnet, torchvision, unet  # noqa: F401  (registers)
from vss.models.adapter import wrap
from vss.models.base import MODELS, AtMost, DefectModel, SegModel, build, check_multiple
from vss.models.resnet_seg import load_backbone, read_state_dict

__all__ = [
    "MODELS",
    "AtMost",
    "DefectModel",
    "SegModel",
    "build",
    "check_multiple",
    "load_backbone",
    "read_state_dict",
    "wrap",
]
