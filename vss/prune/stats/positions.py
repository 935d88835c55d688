"""How many positions the maps of a group have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, Collector
from vss.prune.stats.sites import Layout


@COLLECTORS.register("positions")
class Positions(Collector):
    """The least number of positions of a group's maps where they are made and where they are looked at, () float64.

    A pooled branch that is resized afterwards counts as what it is: one position.
    """

    layout = True

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str) -> None:
        super().__init__(model, groups)
        self.site = site
        self.found: dict[str, Tensor] = {}

    def prepare(self, layout: Layout) -> None:
        """Read the shapes."""
        self.found = {
            group.id: torch.tensor(float(layout.positions(group, self.site)), dtype=torch.float64)
            for group in self.groups
        }

    def finish(self) -> dict[str, Tensor]:
        """Group id -> count."""
        return self.found
