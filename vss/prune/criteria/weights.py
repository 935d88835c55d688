"""L1 and L2 norms of the filters that produce a channel (Li et al., 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from vss.prune.budget import Rounding
from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.plan import Group
from vss.prune.stats import Need, Stats


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


# Filters near the geometric median of their layer (He et al., 2019).


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


# L1 norm with widths that hardware likes (C1 of the KSDD2 study).


Align = Literal["none", "tiered", "strict32"]


def strict32(channels: int, removed: float) -> int:
    """Kept channels: the documented rule of C1, the nearest multiple of 32 (Python's round, half to even), at least 32.

    All stay where nothing was asked for.

    >>> [strict32(64, r) for r in (0.2, 0.4, 0.6)]
    [64, 32, 32]
    """
    if removed <= 0:
        return channels
    return min(channels, max(32, round(_whole(channels, removed) / 32) * 32))


def tiered(channels: int, removed: float) -> int:
    """Kept channels: the executed rule of C1.

    From 256 channels on the nearest multiple of 32 (half up), from 48 on of 8, and 8 less than all where that is 95 %
    or more; below 48 the count is not aligned. Nothing is removed where nothing was asked for, which the published
    code does not guard.

    >>> [tiered(64, r) for r in (0.2, 0.4, 0.6)]
    [48, 40, 24]
    """
    count = _whole(channels, removed)
    if removed <= 0 or channels < 48:
        return count
    step = 32 if channels >= 256 else 8
    count = max(step, math.floor(count / step + 0.5) * step)
    return channels - 8 if channels < 256 and count >= 0.95 * channels else min(count, channels)


def rounding_of(align: Align) -> Rounding | None:
    """The width rule of a name."""
    return {"none": None, "tiered": tiered, "strict32": strict32}[align]


def _whole(channels: int, removed: float) -> int:
    return max(1, int(channels * (1 - removed) + 1e-9))


@CRITERIA.register("hw_l1", aliases=["c1", "ours_c1"])
@dataclass(frozen=True, kw_only=True)
class HwL1(L1):
    """The L1 norm; every group keeps a width that the rule of `align` allows.

    Meant for local budgets, whose published widths it reproduces; a global budget walks over the same widths.

    Args:
        align: "tiered", the rule of the published code, or "strict32", the one of its documentation.
    """

    source = "KSDD2 pruning study, criterion C1"

    align: Align = "tiered"

    @property
    def rounding(self) -> Rounding | None:
        """The rule of `align`."""
        return rounding_of(self.align)


# Network slimming: scales of batch norms (Liu et al., 2017).


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


# Scales of feature norms (the FN baseline of the KSDD2 study).


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


# L1 norm less redundancy (C3 of the KSDD2 study).


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
