"""Prove a cut: the masked network and the sliced one agree, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import AGREEMENT, doubled_outputs, label_agreement, proven_difference
from vss.core.errors import VssError
from vss.core.example import (
    Example,
    Forward,
    at_size,
    default_forward,
    drawn,
    image_of,
    input_channels,
    logits_of,
    on,
    own_attribute,
)
from vss.core.networks import eager
from vss.prune.apply import TOLERANCE, masked
from vss.prune.plan import Plan

Figures = tuple[float, float, float]


@eager
def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    sizes: Iterable[tuple[int, int]] = (),
    *,
    example: Example | None = None,
    forward: Forward | None = None,
) -> dict[str, Any]:
    """Prove a cut: masked network == sliced network, same heads, forward and backward at every size (H, W).

    `small` is what `apply_plan(model, plan)` returned, before any training. A difference beyond the limit is looked at
    again in float64: rounding, which grows in deep networks and moves the indices of pooled maxima, vanishes there; a
    wrong cut does not.

    Args:
        model, small, plan: the network, what was cut from it, and how.
        sizes: (H, W) of the random images; none: those of `example`, and its own values as well.
        example: what the network takes (a tensor, a tuple of arguments, a dict of keywords); default: images with the
            channels of its first convolution.
        forward: how to call the network; default `forward_train` where there is one.

    Returns:
        Figures for the report: `masked_max_abs`, `masked_max_rel` (relative to the spread of the outputs, see
        `vss.core.closeness`), `label_agreement` (share of places with the same largest channel, ties apart), `sizes`,
        `outputs`, `precision` (of the comparison: "float32", or "float64" where it was needed).

    Raises:
        VssError: a relative difference above 1e-4, other labels, an output of another shape or a missing gradient.
    """
    mask, small, forward = masked(model, plan).eval(), small.eval(), forward or default_forward
    images = _images(small, list(sizes), example)
    found, shapes, precision = [], [], "float32"
    for x in images:
        with torch.no_grad():
            figures, outputs = _difference(logits_of(forward(mask, x)), logits_of(forward(small, x)))
        _check_backward(small, mask, x, forward)
        found.append(figures)
        shapes.append(outputs)
    worst = _worst(found)
    if worst[1] > TOLERANCE or worst[2] < AGREEMENT:
        exact = [[doubled_outputs(net, x, lambda n, v: logits_of(forward(n, v))) for net in (mask, small)]
                 for x in images]  # fmt: skip
        worst, precision = _worst([_difference(*pair)[0] for pair in exact]), "float64"
    if worst[1] > TOLERANCE:
        raise VssError(
            f"the cut network differs from the masked one by {worst[1]:.2e} (relative to the spread; at most 1e-4)."
        )
    if worst[2] < AGREEMENT:
        raise VssError(f"the cut network and the masked one have the same label at {worst[2]:.2%} of the places alone.")
    return {
        "masked_max_abs": worst[0],
        "masked_max_rel": worst[1],
        "label_agreement": worst[2],
        "sizes": [list(image_of(x).shape[-2:]) for x in images],
        "outputs": shapes,
        "precision": precision,
    }


def _images(small: nn.Module, sizes: list[tuple[int, int]], example: Example | None) -> list[Example]:
    """Two random images of every size; without sizes the example itself, and random values in its place."""
    generator, device = torch.Generator().manual_seed(0), next(small.parameters()).device
    if example is None and not sizes:
        raise VssError("there is nothing to verify on; give sizes=[(H, W), ...] or example=.")
    if example is None:
        example = torch.zeros(1, input_channels(small), 1, 1)
    images = [drawn(at_size(example, size, 2), generator) for size in sizes] or [example, drawn(example, generator)]
    return [on(image, device) for image in images]


def _worst(found: list[Figures]) -> Figures:
    return max(f[0] for f in found), max(f[1] for f in found), min(f[2] for f in found)


def _difference(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> tuple[Figures, list[list[int]]]:
    """Largest absolute and relative difference of all outputs on one batch, their agreement, and their shapes."""
    if [t.shape for t in wanted] != [t.shape for t in got]:
        raise VssError(f"the cut network's outputs have shapes {[tuple(t.shape) for t in got]}; the heads changed.")
    found: list[Figures] = []
    for a, b in zip(wanted, got, strict=True):
        a, b = a.detach(), b.detach()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise VssError("the cut network gives NaN or infinite outputs; check the checkpoint's weights.")
        found.append((float((a - b).abs().max()), proven_difference(a, b), label_agreement(a, b)))
    return _worst(found), [list(t.shape) for t in got]


def _check_backward(small: nn.Module, mask: nn.Module, x: Example, forward: Forward) -> None:
    """Every parameter of the cut network gets a finite gradient; one that the uncut network never uses need not."""
    grads = _gradients(small, x, forward)
    unused = [name for name, grad in grads.items() if grad is None]
    before = _gradients(mask, x, forward) if unused else {}
    for name, grad in grads.items():
        if (grad is None and before[name] is not None) or (grad is not None and not torch.isfinite(grad).all()):
            raise VssError(f"the cut network gives no finite gradient for {name}.")


def _gradients(model: nn.Module, x: Example, forward: Forward) -> dict[str, Tensor | None]:
    """Gradients of the sum of the outputs' mean squares in the mode that the model is in; `.grad` is left alone."""
    names = [name for name, _ in model.named_parameters()]
    with torch.enable_grad():
        flags = [p.requires_grad for p in model.parameters()]
        model.requires_grad_(True)
        total = torch.stack([out.square().mean() for out in logits_of(forward(model, x))]).sum()
        grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        for buffer in model.buffers():  # one that the forward computes anew holds on to its graph
            if buffer.grad_fn is not None:
                buffer.detach_()
    return dict(zip(names, grads, strict=True))


def two_sizes(size: tuple[int, int], model: nn.Module) -> list[tuple[int, int]]:
    """Two small, differently shaped sizes that the network takes; proofs do not need large images."""
    step = max(own_attribute(model, "least_side", int) or 32, own_attribute(model, "size_multiple", int) or 1)
    small = [max(step, side // 2 // step * step) for side in size]
    return [(small[0] + step, small[1]), (small[0], small[1] + step)]
