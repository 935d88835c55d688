"""Gradients of the loss by a factor on each channel."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vss.core.errors import VssError
from vss.prune.groups import Group, Slot
from vss.prune.stats.base import COLLECTORS, Collector, TapCollector
from vss.prune.stats.members import gate_slots, norm_slots, slot_values
from vss.prune.stats.processes import sum_over_processes
from vss.prune.stats.sites import Tap

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
