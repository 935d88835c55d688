"""Products of filters and their gradients."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vss.core.errors import unknown
from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, Collector
from vss.prune.stats.filters import reduce_slots, spread_over
from vss.prune.stats.gate import gradient
from vss.prune.stats.members import slot_values
from vss.prune.stats.processes import sum_over_processes

Reduce = Literal["abs_of_sum", "sum_of_abs", "square_of_sum", "sum_of_squares"]
REDUCTIONS = ("abs_of_sum", "sum_of_abs", "square_of_sum", "sum_of_squares")


@COLLECTORS.register("weight_gradient")
class WeightGradient(Collector):
    """Per channel, over the filters w of its producers and their gradients g_t in batch t = 1..T.

    Args:
        model: the network.
        groups: its groups.
        reduce: "abs_of_sum": sum |w * mean_t g_t|; "sum_of_abs": mean_t sum |w * g_t|; "square_of_sum":
            mean_t (sum w * g_t)^2, which is about zero for a filter before a batch norm, whose output ignores the
            filter's scale; "sum_of_squares": mean_t sum (w * g_t)^2. Producers add before a square, too.
    """

    gradients = True
    labels = True

    def __init__(self, model: nn.Module, groups: list[Group], *, reduce: Reduce = "abs_of_sum") -> None:
        super().__init__(model, groups)
        if reduce not in REDUCTIONS:
            raise unknown("reduction", reduce, REDUCTIONS)
        self.reduce = reduce
        self.parameters = dict(model.named_parameters())
        self.slots = {
            group.id: [s for s in group.by_role("producer") if self.parameters[s.tensor].ndim > 1] for group in groups
        }
        self.count = self.zeros()
        self.total = {group.id: self.zeros(group.channels) for group in groups}
        self.grads: dict[str, Tensor] = {}
        if reduce == "abs_of_sum":
            names = dict.fromkeys(slot.tensor for slots in self.slots.values() for slot in slots)
            self.grads = {name: self.parameters[name].new_zeros(self.parameters[name].shape).double() for name in names}

    def step(self) -> None:
        """Take the gradients of one batch."""
        self.count += 1
        for name, total in self.grads.items():
            total += gradient(self.parameters, name)
        if self.grads:
            return
        if self.reduce == "sum_of_squares":
            for group in self.groups:
                self.total[group.id] += self._squares(group)
            return
        names = dict.fromkeys(slot.tensor for slots in self.slots.values() for slot in slots)
        grads = {name: gradient(self.parameters, name) for name in names}
        for group_id, value in self._reduced("abs_product" if self.reduce == "sum_of_abs" else "product", grads):
            self.total[group_id] += value.square() if self.reduce == "square_of_sum" else value

    def _reduced(self, mode: Literal["product", "abs_product"], grads: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Group id and (C,) sums over its producers: one call of the op for all layers."""
        slots = [slot for group in self.groups for slot in self.slots[group.id]]
        whole = iter(reduce_slots(self.parameters, slots, mode, grads))
        found = []
        for group in self.groups:
            total = self.zeros(group.channels)
            for slot in self.slots[group.id]:
                total += spread_over(next(whole), slot, group.channels).sum(dim=1)
            found.append((group.id, total))
        return found

    def _squares(self, group: Group) -> Tensor:
        total = self.zeros(group.channels)
        for slot in self.slots[group.id]:
            product = self.parameters[slot.tensor].detach().double() * gradient(self.parameters, slot.tensor).double()
            total += slot_values(product, slot, group.channels).square().sum(dim=1)
        return total

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        count = sum_over_processes(self.count)
        if self.reduce != "abs_of_sum":
            return {group.id: sum_over_processes(self.total[group.id]) / count for group in self.groups}
        means = {name: (sum_over_processes(total) / count).float() for name, total in self.grads.items()}
        return dict(self._reduced("abs_product", means))
