"""Are outputs numbers, and are they the same? Differences are judged against how far an output varies, not its size.

A constant on top of all logits changes no label, and relative to the largest value it would hide any difference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vss.core.errors import NotFinite
from vss.core.example import Example, doubled

if TYPE_CHECKING:
    from torch import Tensor, nn

TINY = 1e-9  # of the largest value: what an output must vary by before its variation counts; float64 resolves it
NETWORK = "give a checkpoint that did not diverge, or train again with a lower learning rate"
ENGINE = "make it of a checkpoint that did not diverge, or in another precision: float16 ends at 65504"
AGREEMENT = 0.999  # share of the places that have the same label
Outputs = Callable[["nn.Module", Example], Sequence["Tensor"]]


def refuse_not_finite(values: Iterable[object], what: str, advice: str) -> None:
    """Raise `NotFinite` unless every value of all these arrays or tensors is a number: NaN has an argmax too."""
    import torch

    if not all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values):
        raise NotFinite(f"{what} gives NaN or infinity, so its results mean nothing; {advice}.")


def spread(values: Tensor) -> float:
    """How far values lie from the mean of their channel at most; where a channel holds one value, the largest value.

    Args:
        values: (N, K, ...), channels in dim 1; or (N,), one channel.
    """
    channels = values.detach().double().reshape(len(values), -1, *values.shape[2:])
    flat = channels.transpose(0, 1).reshape(channels.shape[1], -1)
    if not flat.numel():
        return 0.0
    size = float(flat.abs().max())
    centred = flat - flat.mean(dim=1, keepdim=True) if flat.shape[1] > 1 else flat
    return max(float(centred.abs().max()), TINY * size)


def relative_difference(wanted: Tensor, got: Tensor) -> float:
    """Largest difference over the `spread` of what was wanted; infinite for other shapes and what is not finite."""
    import torch

    if wanted.shape != got.shape or not (torch.isfinite(wanted).all() and torch.isfinite(got).all()):
        return math.inf
    worst = float((wanted.double() - got.double()).abs().max()) if wanted.numel() else 0.0
    return worst / max(spread(wanted), 1e-30) if worst else 0.0


def proven_difference(wanted: Tensor, got: Tensor) -> float:
    """As `relative_difference`, and at least what rounding in this dtype could hide: equal numbers prove no more."""
    import torch

    if not wanted.numel():
        return 0.0
    step = torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
    return max(relative_difference(wanted, got), step / max(spread(wanted), 1e-30) if step else 0.0)


def label_agreement(wanted: Tensor, got: Tensor) -> float:
    """Share of places with the same largest channel, 0..1; ties (up to a millionth of the spread) may go either way."""
    if wanted.ndim < 3 or wanted.shape[1] < 2 or not wanted.numel():
        return 1.0
    chosen = wanted.gather(1, got.argmax(1, keepdim=True)).squeeze(1)
    return float((wanted.amax(1) - chosen <= 1e-6 * spread(wanted)).double().mean())


def alike(first: nn.Module, second: nn.Module, x: Example, outputs: Outputs, tolerance: float) -> bool:
    """Whether two networks give the same outputs and labels; what differs in float32 is asked again in float64.

    Rounding grows in deep networks and moves the indices of pooled maxima, and hides what is small beside a constant;
    it vanishes there, and a wrong cut does not.
    """
    import torch

    def same(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
        pairs = list(zip(wanted, got, strict=True))
        return all(proven_difference(w, g) <= tolerance and label_agreement(w, g) >= AGREEMENT for w, g in pairs)

    with torch.no_grad():
        wanted, got = outputs(first, x), outputs(second, x)
    if same(wanted, got):
        return True
    return same(doubled_outputs(first, x, outputs), doubled_outputs(second, x, outputs))


def doubled_outputs(model: nn.Module, x: Example, outputs: Outputs) -> Sequence[Tensor]:
    """What a network gives in float64, also one that casts to another floating-point type on the way."""
    import torch
    from torch.overrides import TorchFunctionMode

    narrow = (torch.float32, torch.float16, torch.bfloat16)
    casts = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

    class Wide(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
            wide = {key: torch.float64 if value in narrow else value for key, value in (kwargs or {}).items()
                    if isinstance(value, torch.dtype)}  # fmt: skip
            args = tuple(torch.float64 if isinstance(arg, torch.dtype) and arg in narrow else arg for arg in args)
            return (torch.Tensor.double if func in casts else func)(*args, **{**(kwargs or {}), **wide})

    with torch.no_grad(), Wide():
        return outputs(duplicate(model).double(), doubled(x))


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, also of a layer whose weight is computed from others before each call (weight norm, masks).

    torch refuses to copy such a tensor; its copy is a plain one, which the next call replaces.
    """
    from torch import Tensor

    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
