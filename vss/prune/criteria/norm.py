"""L1 and L2 norms of the filters that produce a channel (Li et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.groups import Group
from vss.prune.stats import Stats


@dataclass(frozen=True, kw_only=True)
class _Norm(Criterion):
    """Norm of the concatenation of all producers' filters.

    Raw norms grow with fan-in, so a global ranking compares them after division by the group's mean.

    Args:
        member_rms: first divide each producer by the RMS of its weights, so that coupled members weigh the same.
    """

    member_rms: bool = False

    def _rows(self, group: Group, stats: Stats) -> list[Tensor]:
        rows = stats.rows(group)
        return [row / (row.square().mean().sqrt() + 1e-12) for row in rows] if self.member_rms else rows


@CRITERIA.register("l1", aliases=["naive_l1", "magnitude"])
@dataclass(frozen=True, kw_only=True)
class L1(_Norm):
    """Sum of absolute weights; members add."""

    normalize = "mean"
    source = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) sums."""
        return torch.stack([row.abs().sum(dim=1) for row in self._rows(group, stats)]).sum(dim=0)


@CRITERIA.register("l2")
@dataclass(frozen=True, kw_only=True)
class L2(_Norm):
    """Euclidean norm; members add in squares."""

    normalize = "mean"
    source = "He et al., Soft Filter Pruning, IJCAI 2018"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) norms."""
        return torch.stack([row.square().sum(dim=1) for row in self._rows(group, stats)]).sum(dim=0).sqrt()
