"""The layers of a group and their parameters, channel by channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vss.prune.groups import Group, Slot

Conv = nn.modules.conv._ConvNd
BatchNorm = nn.modules.batchnorm._BatchNorm


def owner(model: nn.Module, tensor: str) -> nn.Module:
    """The module that a parameter belongs to."""
    return model.get_submodule(tensor.rpartition(".")[0])


def gate_slots(model: nn.Module, group: Group) -> list[Any]:
    """Affine parameters of the group's norm layers; where it has none, the producers' weights and biases."""
    return norm_slots(model, group) or group.by_role("producer")


def norm_slots(model: nn.Module, group: Group) -> list[Slot]:
    """Affine parameters of the group's norm layers; depthwise convolutions, which cut like them, are left out."""
    parameters = {name for name, _ in model.named_parameters()}
    return [
        slot
        for slot in group.by_role("norm")
        if slot.tensor in parameters and not isinstance(owner(model, slot.tensor), Conv)
    ]


def norm_modules(model: nn.Module, group: Group) -> list[str]:
    """Names of the group's norm layers, in model order, affine or not."""
    return [name for name in group.module_names("norm") if not isinstance(model.get_submodule(name), Conv)]


def slot_values(value: Tensor, slot: Slot, channels: int) -> Tensor:
    """(channels, D) view of what a slot holds of a tensor: one row a channel."""
    index = slot.indices(torch.arange(channels)).to(value.device)
    return value.index_select(slot.dim, index).movedim(slot.dim, 0).reshape(channels, -1)


def following_norm(model: nn.Module, group: Group, producer: str) -> str | None:
    """The group's norm layer that normalises what `producer` makes: the one defined next after it, of equal width.

    Layers without parameters or buffers may lie between. None where another layer with weights comes first.
    """
    norms = set(norm_modules(model, group))
    names = [
        name
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)] or name == producer
    ]
    after = names[names.index(producer) + 1 :]
    return after[0] if after and after[0] in norms else None


def folding(model: nn.Module, group: Group, slot: Slot) -> Tensor | None:
    """(C, block) float64 factors gamma / sqrt(var + eps) of the batch norm behind a producer, None where there is none.

    The batch norm's own slots say where the group's channels lie in it.
    """
    name = following_norm(model, group, slot.tensor.rpartition(".")[0])
    norm = model.get_submodule(name) if name else None
    if not isinstance(norm, BatchNorm) or norm.running_var is None:
        return None
    place = next(s for s in group.by_role("norm") if s.tensor.rpartition(".")[0] == name)
    if place.block != slot.block:
        return None
    factor = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    return slot_values(factor, Slot(place.tensor, 0, place.offset, place.block), group.channels)
