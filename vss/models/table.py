"""The table of networks, and `build`. Names are known without torch; a network's file is imported when it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vss.core.errors import VssError, one_line, shown, unknown
from vss.core.registry import Registry, checked_options, keyword_options

if TYPE_CHECKING:
    from vss.models.base import SegModel

MODELS: Registry[Callable[..., SegModel]] = Registry("model")

MODELS.later("unet", "vss.models.unet:UNet")
MODELS.later("segnet", "vss.models.segnet:SegNet")
MODELS.later("segdecnet", "vss.models.segdecnet:SegDecNet")
MODELS.later("resnet18_seg", "vss.models.resnet_seg:resnet18_seg")
MODELS.later("resnet34_seg", "vss.models.resnet_seg:resnet34_seg")
MODELS.later("resnet50_seg", "vss.models.resnet_seg:resnet50_seg")
MODELS.later("resnet101_seg", "vss.models.resnet_seg:resnet101_seg")
MODELS.later("deeplabv3_resnet50", "vss.models.torchvision:deeplabv3_resnet50")
MODELS.later("deeplabv3_resnet101", "vss.models.torchvision:deeplabv3_resnet101")
MODELS.later("fcn_resnet50", "vss.models.torchvision:fcn_resnet50")
MODELS.later("fcn_resnet101", "vss.models.torchvision:fcn_resnet101")
MODELS.later("lraspp_mobilenet_v3_large", "vss.models.torchvision:LRASPP")


def build(name: str, /, num_classes: int, **options: Any) -> SegModel:
    """Build a registered network.

    Args:
        name: a name in `MODELS`.
        num_classes: K, 1 to 256 (labels are uint8).
        options: keyword options of that network; an unknown one is refused with the closest name, and one that is not
            what the annotation says by the value.
    """
    factory: Any = MODELS[name]
    if not callable(factory):  # a function that the user has named, see `vss.models.factory`
        return factory.build(num_classes, options)
    known = keyword_options(factory)
    for option in options:
        if option not in known:
            raise unknown(f"option of model {name!r}", option, known)
    if not isinstance(num_classes, int) or not 1 <= num_classes <= 256:
        raise VssError(f"num_classes is {shown(num_classes)}; expected 1 to 256, since labels are uint8.")
    options = checked_options(f"model {name!r}", known, options)
    try:
        model = factory(num_classes, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, MemoryError) as error:
        reason = one_line(str(error)).rstrip(".") or "out of memory"
        raise VssError(f"model {name!r} refuses options {shown(options)}: {reason}.") from error
    model.name, model.options = MODELS.canonical(name), dict(options)
    return model
