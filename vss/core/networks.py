"""Any network before something is done with it: whether that is possible, a plain copy, and its layers by name.

A name is that of a layer, or of a container for all that is in it, or a pattern in which * stands for any part.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vss.core.closeness import duplicate
from vss.core.errors import VssError, unknown

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

F = TypeVar("F", bound=Callable[..., Any])
WRAPPED = "net."
"""What stands before the names of a network that is wrapped; it may be left out."""


def refuse_unready(model: nn.Module) -> None:
    """Refuse a network whose weights have no values yet, or whose layers cannot be exchanged."""
    import torch
    from torch.nn.parameter import is_lazy

    if isinstance(model, torch.jit.ScriptModule):
        raise VssError("the network is one of torch.jit, which fixes its layers; give the one that it was made from.")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            raise VssError(f"{name} has no values, for its lazy layer was never called; call the network once first.")
        if value.is_meta:
            raise VssError(f"{name} has no values, for it is on the meta device; load weights into the network first.")


def settled(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, in which weights that parametrisations compute from others are plain."""
    from torch import nn
    from torch.nn.utils import parametrize

    copied = duplicate(model).cpu().eval()
    for module in [each for each in copied.modules() if parametrize.is_parametrized(each)]:
        names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
        values = {name: getattr(module, name).detach().clone() for name in names}
        module.__class__ = type(module).__bases__[0]  # torch's own removal would change the class, which copies share
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return copied


def eager(function: F) -> F:
    """A function in which networks that torch.compile compiled run as they were: a cut that is tried once is not worth
    the time that compiling it takes."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> Any:
        import torch

        networks = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.nn.Module)]
        if not any(hasattr(module, "_orig_mod") for net in networks for module in net.modules()):
            return function(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return cast("F", run)


def meant(pattern: str, layer: str) -> bool:
    """Whether a name or pattern means a layer, or a container that it is in."""
    own = layer.removeprefix(WRAPPED)
    return any(fnmatchcase(name, each) for name in (layer, own) for each in (pattern, f"{pattern}.*"))


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there within it alone."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


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
