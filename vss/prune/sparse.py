"""Sparse training: a penalty on the scales of norm layers, added to gradients after the backward pass.

Network slimming (Liu et al., ICCV 2017) adds lambda * sign(gamma), the subgradient of lambda * |gamma|, to the gradient
of every scale. Coupled norm layers share their channels, and a channel goes only when all of them let it go: there the
group lasso, lambda * ||(gamma_m,k)_m||_2, shrinks them together (Torch-Pruning's BNScalePruner does the same).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune.plan import Group, Slot
from vss.prune.stats.taps import norm_slots, slot_values

SCALES = ("weight", "scale")  # of batch, instance and group norm; of a feature norm


def scale_slots(model: nn.Module, group: Group) -> list[Slot]:
    """The slots of a group that hold scales of its norm layers, never their shifts."""
    return [slot for slot in norm_slots(model, group) if slot.tensor.rpartition(".")[2] in SCALES]


def penalty(rows: list[Tensor], *, group_lasso: bool) -> tuple[Tensor, list[Tensor]]:
    """Value and subgradients of the penalty of one group.

    Args:
        rows: (C, D) scales of each member.
        group_lasso: the norm over members of each channel; else the sum of absolute values.

    Returns:
        The scalar penalty and one (C, D) subgradient a member; it is 0 where all is 0.
    """
    if not group_lasso:
        return torch.stack([row.abs().sum() for row in rows]).sum(), [row.sign() for row in rows]
    norms = torch.stack([row.square().sum(dim=1) for row in rows]).sum(dim=0).sqrt()
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]
    return norms.sum(), [row / safe for row in rows]


@torch.no_grad()
def add_subgradient(model: nn.Module, groups: Iterable[Group], strength: float, *, group_lasso: bool = True) -> int:
    """Add `strength` times the subgradient to the gradients of the groups' scales; call it after the backward pass.

    Layers that no group holds, whose channels cannot go, are left alone, and so are shifts.

    Returns:
        The number of scale tensors that were reached.

    Raises:
        VssError: no group has a norm layer with scales; a scale has no gradient.
    """
    reached = 0
    parameters = dict(model.named_parameters())
    for group in groups:
        slots = scale_slots(model, group)
        values = [parameters[slot.tensor] for slot in slots]
        if not slots:
            continue
        rows = [slot_values(value, slot, group.channels) for value, slot in zip(values, slots, strict=True)]
        for slot, value, change in zip(slots, values, penalty(rows, group_lasso=group_lasso)[1], strict=True):
            if value.grad is None:
                raise VssError(f"{slot.tensor} got no gradient: its head is outside the loss; include every head.")
            place = slot.indices(torch.arange(group.channels)).to(value.device)
            view = value.grad.movedim(slot.dim, 0)
            view[place] += (strength * change).reshape(view[place].shape)
            reached += 1
    if not reached:
        raise VssError(
            "sparse training needs norm layers with scales on prunable channels and found none; "
            "choose a criterion that reads weights, such as l1 or fpgm."
        )
    return reached


@torch.no_grad()
def scale_facts(model: nn.Module, groups: Iterable[Group], *, bins: int = 20) -> dict[str, Any]:
    """How far the scales are apart, which tells whether the phase has done its work.

    Returns:
        `histogram` of |scale| in `bins` equal bins from 0 to `max`, `median`, and `near_zero`: the fraction below a
        hundredth of the largest. Without a peak at zero the ranking of channels means little.
    """
    parameters = dict(model.named_parameters())
    rows = [
        slot_values(parameters[slot.tensor], slot, group.channels).abs().flatten().double().cpu()
        for group in groups
        for slot in scale_slots(model, group)
    ]
    if not rows:
        raise VssError("this network has no norm layers with scales on prunable channels.")
    values = torch.cat(rows)
    top = float(values.max())
    return {
        "histogram": torch.histc(values, bins=bins, min=0, max=max(top, 1e-12)).long().tolist(),
        "max": top,
        "median": float(values.median()),
        "near_zero": float((values < 0.01 * top).double().mean()),
    }
