"""How much a channel's edge strength varies over its map."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vss import ops
from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, TapCollector
from vss.prune.stats.moving import Average
from vss.prune.stats.sites import Tap


@COLLECTORS.register("texture")
class Texture(TapCollector):
    """(C,) standard deviation over positions of the Sobel magnitude, averaged over images and members.

    Args:
        model: the network.
        groups: its groups.
        site: where to look.
        padding: around a map; "replicate", or the "zeros" of the published code, which sees edges at every border.
        relative: divide by the root mean square of the map, so that a channel's scale does not count.
        ema: decay of a moving average over batches from zero, without bias correction; None takes the mean.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        *,
        site: str,
        padding: Literal["replicate", "zeros"] = "replicate",
        relative: bool = False,
        ema: float | None = None,
    ) -> None:
        super().__init__(model, groups, site=site)
        self.padding, self.relative = padding, relative
        self.average = {group.id: Average(self.zeros(group.channels), ema) for group in groups}

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Add the edge strength of one tensor."""
        maps = tap.maps(x.detach())
        maps = maps.float() if maps.element_size() > 4 else maps
        positions = maps.shape[2] * maps.shape[3]
        sums = ops.map_stats(maps, padding=self.padding).double() / positions
        square, edge, edge_square = (sums[..., ops.STATS.index(n)] for n in _COLUMNS)
        deviation = (edge_square - edge.square()).clamp(min=0).sqrt()
        if self.relative:
            deviation = (deviation / square.sqrt()).nan_to_num(0.0, 0.0, 0.0)
        self.average[group.id].add(deviation.sum(dim=0), len(deviation))

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        return {group.id: self.average[group.id].result() for group in self.groups}


_COLUMNS = ("square_sum", "edge_sum", "edge_square_sum")
