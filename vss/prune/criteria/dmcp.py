"""Widths found by a differentiable Markov search (DMCP): the score side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from torch import Tensor

from vss.core.errors import VssError, unknown
from vss.prune.criteria.base import CRITERIA, Criterion, make_criterion
from vss.prune.plan import Group
from vss.prune.stats import Need, Stats

INDEX = "index"


@CRITERIA.register("dmcp", aliases=["markov"])
@dataclass(frozen=True, kw_only=True)
class Dmcp(Criterion):
    """Rank channels so that at the searched widths exactly each group's last channels are gone.

    The search decides how many channels of a group stay; which ones follows from an order inside the group, of which
    the search nests prefixes. Channel number j in that order, of w searched ones, scores 1 - j / w in (0, 1] when it
    stays and -(j - w + 1) / (C - w) in [-1, 0) when it goes; a budget other than the searched one moves all groups on
    alike.

    Args:
        order: a criterion that orders channels inside a group, best first, or "index" for a network whose channels
            the search has put in order.
        widths: group id -> kept channels, from the search.
    """

    native_ranking = "widths"
    source = "Guo et al., DMCP: Differentiable Markov Channel Pruning for Neural Networks, CVPR 2020"
    sparse_phase = True

    order: str = "l1"
    widths: dict[str, PositiveInt] | None = None

    def __post_init__(self) -> None:
        if self.order == "dmcp":
            raise VssError("order of dmcp must be another criterion, or 'index'.")
        super().__post_init__()

    def requests(self) -> tuple[Need, ...]:
        """What the ordering criterion reads."""
        return () if self.order == INDEX else make_criterion(self.order).requests()

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) scores in [-1, 1]."""
        width = self._width(group)
        position = self._positions(group, stats)
        stays = 1 - position / width
        goes = -(position - width + 1) / max(group.channels - width, 1)
        return torch.where(position < width, stays, goes)

    def _width(self, group: Group) -> int:
        if self.widths is None:
            raise VssError(
                "dmcp needs the widths of a search, widths={group id: kept channels}; run the DMCP search on this "
                "network first."
            )
        if group.id not in self.widths:
            raise unknown("group in the searched widths", group.id, self.widths)
        width = self.widths[group.id]
        if not 1 <= width <= group.channels:
            raise VssError(f"the searched width of {group.id} is {width}; it must be in 1..{group.channels}.")
        return width

    def _positions(self, group: Group, stats: Stats) -> Tensor:
        """(C,) place of each channel in the order, 0 for the best."""
        if self.order == INDEX:
            return torch.arange(group.channels, dtype=torch.float64)
        score = make_criterion(self.order)(group, stats)
        if score is None:
            raise VssError(f"criterion {self.order!r} cannot order the channels of {group.id}; choose another order.")
        best_first = torch.argsort(score.detach().double().cpu(), stable=True).flip(0)
        position = torch.empty(group.channels, dtype=torch.float64)
        position[best_first] = torch.arange(group.channels, dtype=torch.float64)
        return position
