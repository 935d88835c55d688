"""Any network before something is done with it: whether that is possible, without compiling, as a plain copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vss.core.closeness import duplicate
from vss.core.errors import VssError

if TYPE_CHECKING:
    from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


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
    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        networks = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.nn.Module)]
        if not any(hasattr(module, "_orig_mod") for net in networks for module in net.modules()):
            return function(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return cast("F", run)
