"""The table of networks, and `build`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vss.errors import VssError, unknown
from vss.models.base import SegModel
from vss.registry import Registry, checked_options, keyword_options

MODELS: Registry[Callable[..., SegModel]] = Registry("model")


def build(name: str, /, num_classes: int, **options: Any) -> SegModel:
    """Build a registered network.

    Args:
        name: a name in `MODELS`.
        num_classes: K, 1 to 256 (labels are uint8).
        options: keyword options of that network; an unknown one is refused with the closest name, and one that is not
            what the annotation says by the value.
    """
    factory = MODELS[name]
    known = keyword_options(factory)
    for option in options:
        if option not in known:
            raise unknown(f"option of model {name!r}", option, known)
    if not 1 <= num_classes <= 256:
        raise VssError(f"num_classes is {num_classes}; expected 1 to 256, since labels are uint8.")
    options = checked_options(f"model {name!r}", known, options)
    try:
        model = factory(num_classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise VssError(f"model {name!r} refuses options {options}: {error}.") from error
    model.name, model.options = MODELS.canonical(name), dict(options)
    return model
