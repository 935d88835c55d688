"""Networks by name: `build("unet", num_classes=11, width=16)`. A new network is one file here and one row in `factory`.

A network that is not here takes part by `wrap(module, num_classes=...)`, or under a name of its own from a user's
package (`MODELS.register`, see `vss.core.registry`).
"""

from typing import TYPE_CHECKING

from vss.core.registry import lazy_names
from vss.models.factory import MODELS, build

if TYPE_CHECKING:
    from vss.models.adapter import Wrapped, wrap
    from vss.models.base import AtMost, DefectModel, SegModel, check_multiple
    from vss.models.weights import load_backbone, load_weights, read_state_dict

__getattr__ = lazy_names(
    __name__,
    {
        "adapter": ["Wrapped", "wrap"],
        "base": ["AtMost", "DefectModel", "SegModel", "check_multiple"],
        "weights": ["load_backbone", "load_weights", "read_state_dict"],
    },
)

__all__ = [
    "MODELS",
    "AtMost",
    "DefectModel",
    "SegModel",
    "Wrapped",
    "build",
    "check_multiple",
    "load_backbone",
    "load_weights",
    "read_state_dict",
    "wrap",
]
