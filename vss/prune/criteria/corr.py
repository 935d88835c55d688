"""L1 norm less redundancy (C3 of the KSDD2 study)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.groups import Group
from vss.prune.stats import Need, Stats

Redundancy = Literal["max", "mean"]


def greedy_penalty(norm: Tensor, correlation: Tensor, *, lam: float, tau: float, redundancy: Redundancy) -> Tensor:
    """(C,) the value norm - lam * redundancy of each channel when it is the lowest of those left and goes.

    Redundancy counts those left alone, so of two twins the second is judged by its norm again. Values never fall along
    the order of removal, so keeping the K highest is keeping the last K.

    Args:
        norm: (C,) in [0, 1].
        correlation: (C, C) in [-1, 1].
        lam: weight of the penalty.
        tau: correlations up to this do not count; above, (|rho| - tau) / (1 - tau).
        redundancy: the largest, or the mean over the C - 1 others.
    """
    excess = ((correlation.abs() - tau).clamp(min=0) / (1 - tau)).fill_diagonal_(0).to(norm)
    count = len(norm)
    value = torch.empty_like(norm)
    alive = torch.ones(count, dtype=torch.bool, device=norm.device)
    sums, (largest, partner) = excess.sum(dim=1), excess.max(dim=1)
    for _ in range(count):
        penalty = sums / max(count - 1, 1) if redundancy == "mean" else largest
        final = (norm - lam * penalty).masked_fill(~alive, float("inf"))
        k = int(final.argmin())
        value[k] = final[k]
        alive[k] = False
        sums = sums - excess[k]
        lost = (alive & (partner == k)).nonzero()[:, 0]  # those whose closest has gone look for the next
        largest[lost], partner[lost] = (excess[lost] * alive).max(dim=1)
    return value


def outer_product_redundancy(means: Tensor) -> Tensor:
    """(C,) redundancy of the published code: products of normalised channel means above a threshold.

    A product of two entries of a unit vector is at most 1/2, so no pair passes the threshold and all are zero.
    """
    threshold = 0.90 if len(means) < 128 else 0.95 if len(means) < 512 else 0.98
    centred = means - means.mean()
    unit = centred / (centred.square().sum().sqrt() + 1e-12)
    products = torch.outer(unit, unit).fill_diagonal_(0)
    return (products * (products > threshold)).sum(dim=1)


@CRITERIA.register("corr", aliases=["c3", "ours_c3"])
@dataclass(frozen=True, kw_only=True)
class Corr(Criterion):
    """L1 / max(L1) - lam * redundancy, by true Pearson correlation of the maps over images and positions.

    The study's "correlation" is an outer product of channel means, of which no entry can reach its threshold; preset
    "faithful" computes it and is the plain L1 norm.

    Args:
        correlation: "pearson" or "outer".
        site: where to look: "stream" (after the activation), "bn_out", "conv" or "mixed".
        lam: weight of the penalty; 0 is the L1 norm.
        tau: correlations up to this do not count.
        redundancy: "max" or "mean" of the others' excess over tau.
        greedy: judge again after every removal, so that only one of two twins goes.
    """

    needs = ("similarity", "mean")
    source = "KSDD2 pruning study, criterion C3"
    PRESETS = {"faithful": {"correlation": "outer", "site": "conv", "greedy": False}}  # noqa: RUF012

    correlation: Literal["pearson", "outer"] = "pearson"
    site: Literal["stream", "bn_out", "conv", "mixed"] = "stream"
    lam: NonNegativeFloat = 0.3
    tau: Annotated[float, Field(ge=0, lt=1)] = 0.7
    redundancy: Redundancy = "max"
    greedy: bool = True

    def requests(self) -> tuple[Need, ...]:
        """Correlations, or channel means."""
        if self.correlation == "outer":
            return (Need.of("mean", site=self.site),)
        return (Need.of("similarity", site=self.site, metric="pearson"),)

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) scores, at most 1."""
        norm = stats.filter_sums(group, 1)
        norm = norm / (norm.max() + 1e-300)
        found = stats.collected(self.requests()[0], group)
        if self.correlation == "outer":
            penalty = outer_product_redundancy(found)
            return norm - self.lam * penalty / (penalty.max() + 1e-300)
        if self.greedy:
            return greedy_penalty(norm, found, lam=self.lam, tau=self.tau, redundancy=self.redundancy)
        excess = ((found.abs() - self.tau).clamp(min=0) / (1 - self.tau)).fill_diagonal_(0)
        penalty = excess.amax(dim=1) if self.redundancy == "max" else excess.sum(dim=1) / max(len(norm) - 1, 1)
        return norm - self.lam * penalty.to(norm)
