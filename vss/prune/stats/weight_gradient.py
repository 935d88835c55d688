"""Products of filters and their gradients."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vss.errors import unknown
from vss.prune.groups import Group, Slot
from vss.prune.stats.base import COLLECTORS, Collector
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
        if not self.grads:
            for group in self.groups:
                self.total[group.id] += self._batch(group)

    def _batch(self, group: Group) -> Tensor:
        products = [self._product(slot, group, gradient(self.parameters, slot.tensor)) for slot in self.slots[group.id]]
        total = self.zeros(group.channels)
        for product in products:
            if self.reduce == "sum_of_abs":
                total += product.abs().sum(dim=1)
            elif self.reduce == "sum_of_squares":
                total += product.square().sum(dim=1)
            else:
                total += product.sum(dim=1)
        return total.square() if self.reduce == "square_of_sum" else total

    def _product(self, slot: Slot, group: Group, grad: Tensor) -> Tensor:
        return slot_values(self.parameters[slot.tensor].detach().double() * grad.double(), slot, group.channels)

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        count = sum_over_processes(self.count)
        if self.reduce != "abs_of_sum":
            return {group.id: sum_over_processes(self.total[group.id]) / count for group in self.groups}
        means = {name: sum_over_processes(total) / count for name, total in self.grads.items()}
        for group in self.groups:
            for slot in self.slots[group.id]:
                self.total[group.id] += self._product(slot, group, means[slot.tensor]).abs().sum(dim=1)
        return self.total
