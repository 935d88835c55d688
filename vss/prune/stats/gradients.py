"""Gradients of the loss by a factor on each channel."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vss.core.errors import VssError, unknown
from vss.prune.plan import Group, Slot
from vss.prune.stats.base import COLLECTORS, Collector, TapCollector, sum_over_processes
from vss.prune.stats.taps import Tap, gate_slots, norm_slots, reduce_slots, slot_values, spread_over

Part = Literal["all", "norm", "gamma"]


def gradient(parameters: dict[str, nn.Parameter], name: str) -> Tensor:
    """The gradient of a parameter; a missing one is an error that names the layer, never a zero."""
    value = parameters[name].grad
    if value is None:
        raise VssError(
            f"layer {name.rpartition('.')[0]!r} got no gradient: its head is outside the loss; "
            "include every head in the loss or keep that layer out of pruning."
        )
    return value


@COLLECTORS.register("gate")
class GateGradient(Collector):
    """Mean over batches of (sum over members of dL/dgate)^2, the gate being a factor 1 on a channel.

    For a member that ends in a norm layer, dL/dgate = gamma * g_gamma + beta * g_beta (the sum over positions of
    output times gradient, methods: NVlabs Taylor, gate variant). For a producer without a norm it is the sum over its
    filter of w * g plus b * g_b. Signed contributions of coupled members add before squaring: they leave together.

    Args:
        model: the network.
        groups: its groups.
        part: "all" as above; "norm" gives groups without norm layers zeros; "gamma" takes gamma * g_gamma alone.
        joint: False adds the squares of the members instead.
    """

    gradients = True
    labels = True

    def __init__(self, model: nn.Module, groups: list[Group], *, part: Part = "all", joint: bool = True) -> None:
        super().__init__(model, groups)
        self.joint = joint
        self.parameters = dict(model.named_parameters())
        self.slots = {group.id: _members(model, group, part) for group in groups}
        self.total = {group.id: self.zeros(group.channels) for group in groups}
        self.count = self.zeros()

    def step(self) -> None:
        """Add the squared gate gradient of the batch just seen."""
        for group in self.groups:
            gates = [self._gate(slots, group) for slots in self.slots[group.id]]
            if gates:
                stacked = torch.stack(gates)
                squares = stacked.sum(dim=0).square() if self.joint else stacked.square().sum(dim=0)
                self.total[group.id] += squares
        self.count += 1

    def _gate(self, slots: list[Slot], group: Group) -> Tensor:
        """(C,) gate gradient of one member."""
        gate = self.zeros(group.channels)
        for slot in slots:
            product = self.parameters[slot.tensor].detach().double() * gradient(self.parameters, slot.tensor).double()
            gate += slot_values(product, slot, group.channels).sum(dim=1)
        return gate

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        count = sum_over_processes(self.count)
        return {group.id: sum_over_processes(self.total[group.id]) / count for group in self.groups}


def _members(model: nn.Module, group: Group, part: Part) -> list[list[Slot]]:
    """The affine slots of each member layer."""
    slots: list[Any] = gate_slots(model, group) if part == "all" else norm_slots(model, group)
    if part == "gamma":
        slots = [slot for slot in slots if slot.tensor.rpartition(".")[2] != "bias"]
    members: dict[str, list[Slot]] = {}
    for slot in slots:
        members.setdefault(slot.tensor.rpartition(".")[0], []).append(slot)
    return list(members.values())


@COLLECTORS.register("gate_examples")
class GateExamples(TapCollector):
    """Mean over batches of sum over images of (sum over members and positions of y * dL/dy)^2, L the batch's loss.

    The per-example form of the gate gradient. y is the output of a norm layer, or of a producer in a group without
    one; it is formed anew from the layer's input when its gradient arrives, since the network may overwrite it.
    """

    gradients = True
    labels = True

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model, groups, site="bn_out")
        self.total = {group.id: self.zeros(group.channels) for group in groups}
        self.count = self.zeros()
        self.batch: dict[tuple[str, int], Tensor | None] = {}

    def attach(self) -> list[RemovableHandle]:
        """Hooks that see a layer's input and output."""
        self.batch = {}
        handles = []
        for group in self.groups:
            for number, tap in enumerate(self.taps[group.id]):
                module = self.model.get_submodule(tap.module)
                handles.append(module.register_forward_hook(self._watch((group.id, number), tap)))
        return handles

    def _watch(self, key: tuple[str, int], tap: Tap) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            before = inputs[0].detach()
            self.batch.setdefault(key, None)

            def arrive(grad: Tensor) -> None:
                with torch.no_grad():
                    y = type(module).forward(module, before)
                found = tap.maps(y * grad).sum(dim=(2, 3), dtype=torch.float64)
                earlier = self.batch[key]
                self.batch[key] = found if earlier is None else earlier + found

            if output.requires_grad:
                output.register_hook(arrive)

        return hook

    def step(self) -> None:
        """Square and add what the batch's images gave."""
        for group in self.groups:
            gate: Tensor | None = None
            for number, tap in enumerate(self.taps[group.id]):
                found = self.batch.get((group.id, number))
                if found is None:
                    raise self.no_gradient(tap)
                gate = found if gate is None else gate + found
            if gate is not None:
                self.total[group.id] += gate.square().sum(dim=0)
        self.batch = {}
        self.count += 1

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        count = sum_over_processes(self.count)
        return {group.id: sum_over_processes(self.total[group.id]) / count for group in self.groups}


# Moving averages of |dL/dgamma| over steps in which it points the right way.


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


# Products of filters and their gradients.


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
