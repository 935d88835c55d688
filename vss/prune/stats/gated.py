"""Moving averages of |dL/dgamma| over steps in which it points the right way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, Collector
from vss.prune.stats.gate import gradient
from vss.prune.stats.members import norm_slots, slot_values
from vss.prune.stats.processes import sum_over_processes


@COLLECTORS.register("gated_gradient")
class GatedGradient(Collector):
    """|g_gamma| averaged over the batches in which g_gamma * gamma > 0; members of a group are averaged.

    The V2 term of SIRFP, which keeps one sign of the gradient so that frequent classes do not dominate. Groups without
    norm layers get zeros.

    Args:
        model: the network.
        groups: its groups.
        ema: decay of a moving average from zero, without bias correction, that waits where the sign is wrong; None
            takes the plain mean over the batches that count.
    """

    gradients = True
    labels = True

    def __init__(self, model: nn.Module, groups: list[Group], *, ema: float | None = None) -> None:
        super().__init__(model, groups)
        self.ema = ema
        self.parameters = dict(model.named_parameters())
        self.slots = {
            group.id: [s for s in norm_slots(model, group) if s.tensor.rpartition(".")[2] != "bias"] for group in groups
        }
        self.total = {key: self.zeros(len(slots), self._width(key)) for key, slots in self.slots.items()}
        self.seen = {key: self.zeros(len(slots), self._width(key)) for key, slots in self.slots.items()}

    def _width(self, group_id: str) -> int:
        return next(group.channels for group in self.groups if group.id == group_id)

    def step(self) -> None:
        """Take the gradients of one batch."""
        for group in self.groups:
            for number, slot in enumerate(self.slots[group.id]):
                grad = slot_values(gradient(self.parameters, slot.tensor), slot, group.channels).double()
                gamma = slot_values(self.parameters[slot.tensor].detach(), slot, group.channels).double()
                self._add(group.id, number, grad.abs().mean(dim=1), (grad * gamma).sum(dim=1) > 0)

    def _add(self, group_id: str, number: int, value: Tensor, right: Tensor) -> None:
        total = self.total[group_id][number]
        if self.ema is None:
            total += value * right
            self.seen[group_id][number] += right
        else:
            total.copy_(torch.where(right, self.ema * total + (1 - self.ema) * value, total))
            self.seen[group_id][number].fill_(1)

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        found = {}
        for group in self.groups:
            total, seen = sum_over_processes(self.total[group.id]), sum_over_processes(self.seen[group.id])
            means = total / seen.clamp(min=1)
            found[group.id] = means.mean(dim=0) if len(means) else self.zeros(group.channels)
        return found
