"""Criteria that read the network alone: norms of filters, their geometric median, scales of norm layers; controls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from vss.core.errors import VssError, unknown
from vss.prune.criteria.base import CRITERIA, Align, Criterion, make_criterion, rounding_of
from vss.prune.stats import Need

if TYPE_CHECKING:
    from torch import Tensor

    from vss.prune.budget import Rounding
    from vss.prune.plan import Group
    from vss.prune.stats.base import Stats

INDEX = "index"


@CRITERIA.register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Uniform scores from a generator keyed by (seed, group id): independent of call order and of other groups."""

    source = "control"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        import torch

        digest = hashlib.sha256(f"{stats.seed}|{group.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(group.channels, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class _Norm(Criterion):
    """Norm of the concatenation of all producers' filters.

    Raw norms grow with fan-in, so a global ranking compares them after division by the group's mean.

    Args:
        member_rms: first divide each producer by the RMS of its weights, so that coupled members weigh the same.
        fold_bn: first multiply each filter by gamma / sqrt(var + eps) of the batch norm behind it, since a filter
            before a batch norm has an arbitrary scale.
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
        return self._sums(group, stats, 1)


@CRITERIA.register("l2")
@dataclass(frozen=True, kw_only=True)
class L2(_Norm):
    """Euclidean norm; members add in squares."""

    normalize = "mean"
    source = "He et al., Soft Filter Pruning, IJCAI 2018"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        return self._sums(group, stats, 2).sqrt()


@CRITERIA.register("lamp")
@dataclass(frozen=True, kw_only=True)
class Lamp(_Norm):
    """The squared norm over the sum of those from it upwards in its group: how much of what is left a channel is.

    Published for single weights, with one global ranking; here of filters, whose last one of a group never goes first.
    """

    normalize = "lamp"
    native_ranking = "global"
    source = "Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        return self._sums(group, stats, 2)


def filters(group: Group, stats: Stats, *, fold_bn: bool, member_rms: bool) -> list[Tensor]:
    """(C, D) float64 filters of each producer, optionally folded, then divided by the RMS of the producer."""
    rows = stats.rows(group, fold_bn=fold_bn)
    return [row / (row.square().mean().sqrt() + 1e-12) for row in rows] if member_rms else rows


def distances(rows: list[Tensor]) -> Tensor:
    """(C, C) float64 Euclidean distances between the concatenated filters of all producers.

    By way of a Gram matrix of centred filters, so equal filters may be about 1e-8 of their size apart.
    """
    import torch

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
        fold_bn, member_rms: as for "l1".
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
        import torch

        rows = filters(group, stats, fold_bn=self.fold_bn, member_rms=self.member_rms)
        norms = torch.stack([row.square().sum(dim=1) for row in rows]).sum(dim=0)
        order = torch.argsort(norms, stable=True)
        first = int(len(order) * (1 - self.rate_norm))
        gone, left = order[:first], order[first:].sort().values
        score = torch.zeros_like(norms)
        score[gone] = torch.arange(-len(gone), 0, dtype=score.dtype, device=score.device)
        score[left] = distances([row[left] for row in rows]).sum(dim=1)
        return score


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
        return rounding_of(self.align)


def reduce_members(rows: list[Tensor], how: Literal["mean", "sum", "max"]) -> Tensor:
    """(C,) from the (C, block) absolute values of every member."""
    import torch

    stacked = torch.cat(rows, dim=1).abs()
    if how == "max":
        return stacked.amax(dim=1)
    return stacked.sum(dim=1) if how == "sum" else stacked.mean(dim=1)


@CRITERIA.register("wanda", aliases=["activation_norm"])
@dataclass(frozen=True, kw_only=True)
class Wanda(Criterion):
    """Norm of a channel's activations times the absolute weights that read it, added over its consumers.

    Published for single weights, |w| times the norm of its input, compared within a layer; a channel's score adds those
    of the weights that go with it. A global ranking compares scores after division by the group's mean.

    Args:
        site: where the activations are looked at: "stream" (after the activation), "bn_out", "conv" or "mixed".
    """

    needs = ("mean",)
    normalize = "mean"
    source = "Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), ICLR 2024"

    site: Literal["stream", "bn_out", "conv", "mixed"] = "stream"

    def requests(self) -> tuple[Need, ...]:
        return (Need.of("mean", site=self.site, power=2),)

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        from vss.prune.stats.taps import slot_values

        readers = [slot for slot in group.by_role("consumer") if stats.tensor(slot.tensor).ndim > 1]
        if not readers:
            return None
        rows = [slot_values(stats.tensor(slot.tensor), slot, group.channels) for slot in readers]
        return stats.collected(self.requests()[0], group).sqrt() * sum(r.double().abs().sum(dim=1) for r in rows)


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
        rows = stats.norm_rows(group, "weight")
        return reduce_members(rows, self.reduce) if rows else None


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
        return (Need("feature_norm_std"),) if self.effective else ()

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        rows = [row.mean(dim=1, keepdim=True) for row in stats.norm_rows(group, "scale")]
        if not rows:
            return None
        if self.effective:
            spreads = stats.collected("feature_norm_std", group)
            rows = [row.abs() * spread[:, None] for row, spread in zip(rows, spreads, strict=True)]
        return reduce_members(rows, self.reduce)


@CRITERIA.register("dmcp", aliases=["markov"])
@dataclass(frozen=True, kw_only=True)
class Dmcp(Criterion):
    """Rank channels so that at the searched widths exactly each group's last channels are gone.

    The search decides how many channels of a group stay; which ones follows from an order inside the group, of which
    the search nests prefixes. Channel number j in that order, of w searched ones, scores 1 - j / w in (0, 1] when it
    stays and -(j - w + 1) / (C - w) in [-1, 0) when it goes; another budget than the searched one moves all groups on
    alike.

    Args:
        order: a criterion that orders channels inside a group, best first, or "index" for a network whose channels the
            search has put in order.
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
        return () if self.order == INDEX else make_criterion(self.order).requests()

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        import torch

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
        import torch

        if self.order == INDEX:
            return torch.arange(group.channels, dtype=torch.float64)
        score = make_criterion(self.order)(group, stats)
        if score is None:
            raise VssError(f"criterion {self.order!r} cannot order the channels of {group.id}; choose another order.")
        best_first = torch.argsort(score.detach().double().cpu(), stable=True).flip(0)
        position = torch.empty(group.channels, dtype=torch.float64)
        position[best_first] = torch.arange(group.channels, dtype=torch.float64)
        return position
