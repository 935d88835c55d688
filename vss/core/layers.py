"""Layers by name: a layer, a container for all that is in it, or a pattern in which * stands for any part of a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from vss.core.errors import VssError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn

WRAPPED = "net."
"""What stands before the names of a network that is wrapped; it may be left out."""


def meant(pattern: str, layer: str) -> bool:
    """Whether a name or pattern means a layer, or a container that it is in."""
    own = layer.removeprefix(WRAPPED)
    return any(fnmatchcase(name, each) for name in (layer, own) for each in (pattern, f"{pattern}.*"))


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every module -> its first one: a module may be registered under several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(part), name) for name, part in model.named_modules(remove_duplicate=False)}


def repeated(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names in a network's own state dict of a tensor that an earlier name holds as well -> that name."""
    first: dict[object, str] = {}
    found = {
        name: first.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
        for name, value in state.items()
        if value.numel() and value.data_ptr()
    }
    return {name: earlier for name, earlier in found.items() if earlier != name}


def layers_named(model: nn.Module, patterns: Iterable[str], what: str) -> tuple[str, ...]:
    """The layers that names and patterns mean, in order and by their first names.

    One that means none is refused as `what`.
    """
    known = {name: first for name, first in first_names(model).items() if name}
    found = dict[str, None]()
    for pattern in patterns:
        here = [first for name, first in known.items() if meant(pattern, name)]
        if not here:
            raise unknown(what, pattern, list(known))
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
