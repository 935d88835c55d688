"""How much a feature norm layer lets through of each channel's spread."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, Collector
from vss.prune.stats.members import norm_slots
from vss.prune.stats.processes import sum_over_processes
from vss.prune.stats.sites import Tap

EPS = 1e-3  # of SegDecNet's feature norm, where the layer does not say its own


@COLLECTORS.register("feature_norm_std")
class FeatureNormStd(Collector):
    """(M, C) mean over images of sd / sqrt(sd + eps), one row for each of the group's M feature norm layers.

    A feature norm computes scale * (x - mean) / sqrt(sd + eps) + bias with sd the unbiased standard deviation over
    positions, so |scale| times this is the standard deviation of what it puts out. It is recognised by its parameter
    `scale`. A map of one position has no spread and counts as 0.
    """

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model, groups)
        self.slots = {
            group.id: [slot for slot in norm_slots(model, group) if slot.tensor.rpartition(".")[2] == "scale"]
            for group in groups
        }
        self.total = {group.id: self.zeros(len(self.slots[group.id]), group.channels) for group in groups}
        self.count = {group.id: self.zeros(len(self.slots[group.id])) for group in groups}

    def attach(self) -> list[RemovableHandle]:
        """One hook for each feature norm layer."""
        handles = []
        for group in self.groups:
            for number, slot in enumerate(self.slots[group.id]):
                name = slot.tensor.rpartition(".")[0]
                tap = Tap(name, "input", group.channels, slot.offset, slot.block)
                handles.append(tap.hook(self.model, self._watch(group, number, tap)))
        return handles

    def _watch(self, group: Group, number: int, tap: Tap) -> Any:
        def call(module: nn.Module, x: Tensor) -> None:
            maps = tap.maps(x.detach()).flatten(2).double()
            if maps.shape[2] > 1:
                sd = maps.std(dim=2)
                passed = sd / (sd + float(getattr(module, "eps", EPS))).sqrt()
                self.total[group.id][number] += passed.sum(dim=0)
            self.count[group.id][number] += maps.shape[0]

        return call

    def finish(self) -> dict[str, Tensor]:
        """(M, C) float64 per group."""
        found = {}
        for group in self.groups:
            total, count = sum_over_processes(self.total[group.id]), sum_over_processes(self.count[group.id])
            found[group.id] = total / count.clamp(min=1)[:, None]
        return found
