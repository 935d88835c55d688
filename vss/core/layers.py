"""Layers by name: a layer, a container for all that is in it, or a pattern in which * stands for any part of a name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from vss.core.errors import VssError, unknown

if TYPE_CHECKING:
    from torch import nn

WRAPPED = "net."
"""What stands before the names of a network that is wrapped; it may be left out."""


def meant(pattern: str, layer: str) -> bool:
    """Whether a name or pattern means a layer, or a container that it is in."""
    own = layer.removeprefix(WRAPPED)
    return any(fnmatchcase(name, each) for name in (layer, own) for each in (pattern, f"{pattern}.*"))


def layers_named(model: nn.Module, patterns: Iterable[str], what: str) -> tuple[str, ...]:
    """The layers that names and patterns mean, in order; one that means none is refused as `what`."""
    known = [name for name, _ in model.named_modules() if name]
    found = dict[str, None]()
    for pattern in patterns:
        here = [name for name in known if meant(pattern, name)]
        if not here:
            raise unknown(what, pattern, known)
        found |= dict.fromkeys(here)
    return tuple(found)


def refuse_unmeant(patterns: Iterable[str], layers: Iterable[str], what: str) -> None:
    """Refuse a pattern that means none of the layers that can be cut."""
    known = list(layers)
    for pattern in patterns:
        if not any(meant(pattern, layer) for layer in known):
            error = unknown("layer", pattern, known)
            raise VssError(
                f"{what} {pattern!r} names no layer that can be cut (frozen and locked ones cannot): {error}"
            )
