"""L1 and L2 norms of the filters that produce a channel (Li et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        fold_bn: first multiply each filter by gamma / sqrt(var + eps) of the batch norm behind it; a filter before a
            batch norm has an arbitrary scale without it.
    """

    member_rms: bool = False
    fold_bn: bool = False

    def _sums(self, group: Group, stats: Stats, power: Literal[1, 2]) -> Tensor:
        return stats.filter_sums(group, power, fold_bn=self.fold_bn, member_rms=self.member_rms)


@CRITERIA.register("l1", aliases=["naive_l1", "magnitude"])
@dataclass(frozen=True, kw_only=True)
class L1(_Norm):
    """Sum of absolute weights; members add."""

    normalize = "mean"
    source = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) sums."""
        return self._sums(group, stats, 1)


@CRITERIA.register("l2")
@dataclass(frozen=True, kw_only=True)
class L2(_Norm):
    """Euclidean norm; members add in squares."""

    normalize = "mean"
    source = "He et al., Soft Filter Pruning, IJCAI 2018"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) norms."""
        return self._sums(group, stats, 2).sqrt()
