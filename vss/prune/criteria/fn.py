"""Scales of feature norms (the FN baseline of the KSDD2 study)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.criteria.slimming import reduce_members
from vss.prune.groups import Group
from vss.prune.stats import Need, Stats


@CRITERIA.register("fn", aliases=["naive_fn"])
@dataclass(frozen=True, kw_only=True)
class Fn(Criterion):
    """|scale| of the feature norms of a group, ranked globally as it is.

    A feature norm divides by the square root of the standard deviation, so its output still grows with its input, and
    |scale| alone does not say how much of a channel arrives.

    Args:
        effective: multiply by the mean of sd / sqrt(sd + eps) over calibration images: the standard deviation of what
            the layer puts out. False is the published score and needs no images.
        reduce: over coupled layers.
    """

    needs = ("feature_norm_std",)
    native_ranking = "global"
    source = "KSDD2 pruning study, baseline FN"
    PRESETS = {"faithful": {"effective": False, "reduce": "max"}}  # noqa: RUF012
    sparse_phase = True

    effective: bool = True
    reduce: Literal["mean", "sum", "max"] = "mean"

    def requests(self) -> tuple[Need, ...]:
        """Spreads of the layers' inputs, where they count."""
        return (Need("feature_norm_std"),) if self.effective else ()

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        """(C,) absolute scales, or None where the group has no feature norm."""
        rows = [row.mean(dim=1, keepdim=True) for row in stats.norm_rows(group, "scale")]
        if not rows:
            return None
        if self.effective:
            spreads = stats.collected("feature_norm_std", group)
            rows = [row.abs() * spread[:, None] for row, spread in zip(rows, spreads, strict=True)]
        return reduce_members(rows, self.reduce)
