"""The table of networks, and `build`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from vss.core.errors import VssError, one_line, shown, unknown
from vss.core.registry import Registry, checked_options, keyword_options
from vss.models.base import SegModel

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


class AtMost(TorchDispatchMode):
    """Within it, tensors of at most so many elements altogether are made; more is a `VssError` before the memory is
    taken. For networks whose options came in a file.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.left = elements

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first = func._schema.arguments[0].name if func._schema.arguments else ""
        if first == "size":
            self.left -= math.prod(args[0])
            if self.left < 0:
                raise VssError("its tensors would be larger than those in the file")
        return func(*args, **(kwargs or {}))
