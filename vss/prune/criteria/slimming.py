"""Network slimming: scales of batch norms (Liu et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.groups import Group
from vss.prune.stats import Stats


def reduce_members(rows: list[Tensor], how: Literal["mean", "sum", "max"]) -> Tensor:
    """(C,) from the (C, block) absolute values of every member."""
    stacked = torch.cat(rows, dim=1).abs()
    if how == "max":
        return stacked.amax(dim=1)
    return stacked.sum(dim=1) if how == "sum" else stacked.mean(dim=1)


@CRITERIA.register("slimming", aliases=["network_slimming"])
@dataclass(frozen=True, kw_only=True)
class Slimming(Criterion):
    """|gamma| of the norm layers of a group, ranked globally as it is.

    Layers without a norm layer are not scored by the method and go last; a network without any is refused.

    Args:
        reduce: over coupled norm layers; "max" keeps a channel that any member needs, as masks that are united do.
    """

    native_ranking = "global"
    source = "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    PRESETS = {"faithful": {"reduce": "max"}}  # noqa: RUF012
    sparse_phase = True

    reduce: Literal["mean", "sum", "max"] = "mean"

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        """(C,) absolute scales, or None."""
        rows = stats.norm_rows(group, "weight")
        return reduce_members(rows, self.reduce) if rows else None
