"""First-order Taylor importance of filters (C4 of the KSDD2 study)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.groups import Group
from vss.prune.stats import Need, Stats


@CRITERIA.register("taylor_fo", aliases=["c4", "ours_c4"])
@dataclass(frozen=True, kw_only=True)
class TaylorFo(Criterion):
    """Sum over the filter of |w * g|; members add.

    Losses are ranked locally in the study; a global ranking compares scores after division by the group's mean.

    Args:
        reduce: g as the mean over batches ("abs_of_sum", as published up to the number of batches), or the mean over
            batches of |w * g| ("sum_of_abs"), or of (sum w * g)^2 ("square_of_sum"), which says nothing about a filter
            before a batch norm, where the signed sum is zero.
        batch_norm: "train" uses each batch's own statistics, as the study does; its network has none.
    """

    needs = ("weight_gradient",)
    normalize = "mean"
    source = "KSDD2 pruning study, criterion C4"
    PRESETS = {"faithful": {"reduce": "abs_of_sum", "batch_norm": "train"}}  # noqa: RUF012

    reduce: Literal["abs_of_sum", "sum_of_abs", "square_of_sum"] = "abs_of_sum"
    batch_norm: Literal["eval", "train"] = "eval"

    def requests(self) -> tuple[Need, ...]:
        """Products of filters and gradients."""
        return (Need.of("weight_gradient", reduce=self.reduce),)

    def batch_norm_mode(self) -> Literal["eval", "train"]:
        """As the option says."""
        return self.batch_norm

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) loss; of "square_of_sum" its square."""
        return stats.collected(self.requests()[0], group)
