"""Mean of every channel over images and positions."""

from __future__ import annotations

from torch import Tensor, nn

from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, TapCollector
from vss.prune.stats.processes import sum_over_processes
from vss.prune.stats.sites import Tap


@COLLECTORS.register("mean")
class MapMean(TapCollector):
    """(C,) mean value of each channel over images and positions; members of a group are averaged."""

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str) -> None:
        super().__init__(model, groups, site=site)
        self.total = {group.id: self.zeros(group.channels) for group in groups}
        self.count = {group.id: self.zeros() for group in groups}

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Add the sums of one tensor."""
        maps = tap.maps(x.detach())
        self.total[group.id] += maps.double().sum(dim=(0, 2, 3))
        self.count[group.id] += maps.shape[0] * maps.shape[2] * maps.shape[3]

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        return {
            group.id: sum_over_processes(self.total[group.id]) / sum_over_processes(self.count[group.id])
            for group in self.groups
        }
