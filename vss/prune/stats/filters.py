"""Norms of the filters that make a channel, from one pass over all weights of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vss import ops
from vss.prune.groups import Group, Slot
from vss.prune.stats.members import Conv, folding, slot_values

Mode = Literal["l1", "l2", "product", "abs_product"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reduce_slots(
    parameters: Mapping[str, Tensor], slots: Sequence[Slot], mode: Mode, grads: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """`vss.ops.channel_reduce` along the dimension of every slot, all in one call.

    Args:
        parameters: by full name.
        slots: of weights with two dimensions or more.
        mode: as the op's.
        grads: like `parameters`, for the modes that need them.

    Returns:
        Per slot (size of its dimension,) float64.
    """
    weights = [parameters[slot.tensor].detach() for slot in slots]
    products = [grads[slot.tensor] for slot in slots] if grads is not None else []
    if len({tensor.dtype for tensor in (*weights, *products)}) > 1 or any(w.dtype not in DTYPES for w in weights):
        weights, products = [w.float() for w in weights], [g.float() for g in products]
    found = ops.channel_reduce(weights, products, mode=mode, dims=[slot.dim for slot in slots])
    return [value.double() for value in found]


def spread_over(value: Tensor, slot: Slot, channels: int) -> Tensor:
    """(channels, block) entries of a group in a vector along the slot's dimension."""
    return slot_values(value, Slot(slot.tensor, 0, slot.offset, slot.block), channels)


class FilterNorms:
    """Per-channel norms of every layer's weight, computed when first asked for: one call of the op for each kind.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self._found: dict[tuple[str, int, Mode], Tensor] = {}

    def sums(self, group: Group, power: Literal[1, 2], *, fold_bn: bool, member_rms: bool) -> list[Tensor]:
        """For each producer of a group (C,) float64, the sum of |w|^power over a channel's filter, biases left out.

        Args:
            group: whose producers.
            power: 1 or 2.
            fold_bn: multiply each filter by gamma / sqrt(var + eps) of the batch norm behind it, where there is one.
            member_rms: divide each producer by the root of the mean square of its (folded) weights.
        """
        found = []
        for slot in group.by_role("producer"):
            weight = self.parameters[slot.tensor]
            if weight.ndim < 2:
                continue
            factor = folding(self.model, group, slot) if fold_bn else None
            value = self._power(slot, power, group.channels, factor)
            if member_rms:
                count = group.channels * slot.block * (weight.numel() // weight.shape[slot.dim])
                rms = (self._power(slot, 2, group.channels, factor).sum() / count).sqrt() + 1e-12
                value = value / rms**power
            found.append(value)
        return found

    def _power(self, slot: Slot, power: Literal[1, 2], channels: int, factor: Tensor | None) -> Tensor:
        value = spread_over(self._whole(slot, "l1" if power == 1 else "l2"), slot, channels)
        value = value if factor is None else value * factor.abs()
        return (value if power == 1 else value.square()).sum(dim=1)

    def _whole(self, slot: Slot, mode: Mode) -> Tensor:
        """(size,) norms along a slot's dimension; the first call of a mode does all layers."""
        key = (slot.tensor, slot.dim, mode)
        if key not in self._found:
            known = {(slot.tensor, slot.dim), *((tensor, dim) for tensor, dim, kind in self._found if kind == mode)}
            others = (s for s in _outputs(self.model) if s.tensor in self.parameters)  # a parametrised one has none
            slots = [slot, *(s for s in others if (s.tensor, s.dim) not in known)]
            values = reduce_slots(self.parameters, slots, mode)
            self._found |= {(s.tensor, s.dim, mode): value for s, value in zip(slots, values, strict=True)}
        return self._found[key]


def _outputs(model: nn.Module) -> list[Slot]:
    """The output dimension of every convolution and linear layer."""
    return [
        Slot(f"{name}.weight" if name else "weight", 1 if isinstance(layer, Conv) and layer.transposed else 0)
        for name, layer in model.named_modules()
        if isinstance(layer, Conv | nn.Linear)
    ]
