"""Filters near the geometric median of their layer (He et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.groups import Group
from vss.prune.stats import Stats


def filters(group: Group, stats: Stats, *, fold_bn: bool, member_rms: bool) -> list[Tensor]:
    """(C, D) float64 filters of each producer, optionally folded, then divided by the RMS of the producer."""
    rows = stats.rows(group, fold_bn=fold_bn)
    return [row / (row.square().mean().sqrt() + 1e-12) for row in rows] if member_rms else rows


def distances(rows: list[Tensor]) -> Tensor:
    """(C, C) float64 Euclidean distances between the concatenated filters of all producers.

    By way of a Gram matrix of centred filters, so equal filters may be about 1e-8 of their size apart.
    """
    squares = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.float64, device=rows[0].device)
    for row in rows:
        centred = row.double() - row.double().mean(dim=0)
        gram = centred @ centred.T
        squares += gram.diagonal()[:, None] + gram.diagonal()[None, :] - 2 * gram
    return squares.clamp(min=0).fill_diagonal_(0).sqrt()


@CRITERIA.register("fpgm", aliases=["geometric_median"])
@dataclass(frozen=True, kw_only=True)
class Fpgm(Criterion):
    """Sum of distances to all other filters: the smallest are the most replaceable.

    A local criterion; a global ranking, which the paper does not define, compares scores after division by the group's
    mean. Squared distances of coupled producers add, which is the distance of their concatenated filters.

    Args:
        fold_bn: multiply each filter by gamma / sqrt(var + eps) of the batch norm behind it: the raw scale of a filter
            before a batch norm is arbitrary.
        member_rms: divide each producer by the RMS of its weights.
        rate_norm: fraction of filters that a first stage keeps by L2 norm; int(C * (1 - rate_norm)) go first, and
            distances count between the others alone. 1 is pure FPGM.
    """

    normalize = "mean"
    source = "He et al., Filter Pruning via Geometric Median, CVPR 2019"
    PRESETS = {"faithful": {"fold_bn": False, "member_rms": False}}  # noqa: RUF012

    fold_bn: bool = True
    member_rms: bool = True
    rate_norm: Annotated[float, Field(gt=0, le=1)] = 1.0

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) distances; of filters that the first stage removes the negative rank."""
        rows = filters(group, stats, fold_bn=self.fold_bn, member_rms=self.member_rms)
        norms = torch.stack([row.square().sum(dim=1) for row in rows]).sum(dim=0)
        order = torch.argsort(norms, stable=True)
        first = int(len(order) * (1 - self.rate_norm))
        gone, left = order[:first], order[first:].sort().values
        score = torch.zeros_like(norms)
        score[gone] = torch.arange(-len(gone), 0, dtype=score.dtype, device=score.device)
        score[left] = distances([row[left] for row in rows]).sum(dim=1)
        return score
