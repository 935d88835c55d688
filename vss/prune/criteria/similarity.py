"""Criteria that look for channels which repeat each other: SIRFP's greedy elimination, and L1 less correlation (C3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from vss.prune.criteria.base import (
    CRITERIA,
    Criterion,
    Scope,
    in_backbone,
    normalized,
    pooled,
    rank_in_group,
)
from vss.prune.stats import BatchNormMode, Need

if TYPE_CHECKING:
    from torch import Tensor

    from vss.prune.plan import Group
    from vss.prune.stats.base import Stats

_log = logging.getLogger(__name__)
Redundancy = Literal["max", "mean"]


def redundancy(similarity: Tensor, *, diag: bool = False) -> tuple[Tensor, Tensor]:
    """Greedy elimination on |similarity| (C, C), symmetric; `diag` counts a channel's similarity with itself.

    Returns:
        order (C,) int64 of removal and v (C,) float64, the sum of a channel's similarities to those left when it went;
        v does not increase along the order. A tie goes to the lowest channel.
    """
    from vss import ops

    matrix = similarity.abs().float().contiguous()
    if not diag:
        matrix = matrix.clone().fill_diagonal_(0)
    return ops.greedy_order(matrix)


def z_score(value: Tensor) -> Tensor:
    """(C,) deviations from the mean in standard deviations; zeros where all are equal."""
    import torch

    deviation = value.std(unbiased=False)
    centred = value - value.mean()
    return centred / deviation if deviation > 1e-12 * (value.abs().max() + 1e-300) else torch.zeros_like(value)


@CRITERIA.register("sirfp", aliases=["spatial_redundancy"])
@dataclass(frozen=True, kw_only=True)
class Sirfp(Criterion):
    """lam * aux - v, where v is a channel's redundancy when the greedy elimination reaches it.

    With lam = 0 the kept channels are exactly the last survivors of the elimination: the greedy answer to keeping the
    K channels with the least mutual similarity. With lam > 0 that order is re-ranked once.

    The published form (preset "faithful") reads batch norm outputs member by member, divides maps by their sum of
    absolutes, counts the diagonal, sums signed products before taking the absolute, and compares raw sums across
    layers, which then mostly tells how wide and how small a layer's maps are. Preset "faithful_v2" takes the gated
    gradient in place of edges. The default reads the stream tensor of coupled groups, cosines, no diagonal, and divides
    v by the number of positions. With the sum over a layer's channels this keeps what is useful in comparing raw sums,
    that a channel among many, on small maps, is worth less; scaling v to [0, 1] within each group ("max") loses it.

    Args:
        site: "mixed" (stream for coupled groups, norm output for others), "stream", "bn_out" or "conv".
        metric: "cosine", "pearson" or "l1gram".
        diag: count a channel's similarity with itself.
        per_image: absolute similarities of single images are averaged, so that opposite signs do not cancel.
        aux: "edge" (spread of Sobel magnitude), "gated" (|g_gamma| of the right sign), "taylor" (root of the gate
            Taylor score) or "none".
        aux_scale: "z" standardises aux inside the group, "none" takes it as it is.
        lam: weight of aux.
        lam_head: weight of aux for groups outside the backbone; None takes `lam`.
        scale: of v: "positions" divides by their number, "max" by the group's largest, "alive" by the number of others
            alive at that step, "none".
        pool: "global" compares scores of all groups; "group" ranks within each group; "backbone_head" ranks within two
            pools, layers whose name begins with "backbone" and all others, so that each loses the same fraction.
        ema: decay of moving averages, for statistics recorded during training; None takes means.
        edge_padding: around maps for Sobel: "replicate", or the "zeros" of the published code.
        min_positions: groups whose maps have fewer positions are ranked by L1 norm instead; 0 scores them all.
        batch_norm: "train" uses each batch's own statistics, as the published code does.
    """

    needs = ("similarity", "texture", "gated_gradient", "gate", "positions")
    native_ranking = "pools"
    source = "Wu et al., Structural Pruning via Spatial-aware Information Redundancy (SIRFP), AAAI 2025"
    PRESETS = {  # noqa: RUF012
        "faithful": {
            "site": "bn_out", "metric": "l1gram", "diag": True, "aux": "edge", "aux_scale": "none", "lam": 0.4,
            "lam_head": 0.0, "scale": "none", "pool": "backbone_head", "ema": 0.999, "edge_padding": "zeros",
            "min_positions": 0, "batch_norm": "train",
        },
        "faithful_v2": {
            "site": "bn_out", "metric": "l1gram", "diag": True, "aux": "gated", "aux_scale": "none", "lam": 0.4,
            "scale": "none", "pool": "backbone_head", "ema": 0.999, "min_positions": 0, "batch_norm": "train",
        },
    }  # fmt: skip

    site: Literal["mixed", "stream", "bn_out", "conv"] = "mixed"
    metric: Literal["cosine", "pearson", "l1gram"] = "cosine"
    diag: bool = False
    per_image: bool = False
    aux: Literal["edge", "gated", "taylor", "none"] = "edge"
    aux_scale: Literal["z", "none"] = "z"
    lam: NonNegativeFloat = 0.1
    lam_head: NonNegativeFloat | None = None
    scale: Literal["positions", "max", "alive", "none"] = "positions"
    pool: Literal["global", "group", "backbone_head"] = "global"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    edge_padding: Literal["replicate", "zeros"] = "replicate"
    min_positions: NonNegativeInt = 16
    batch_norm: BatchNormMode = "eval"

    def requests(self) -> tuple[Need, ...]:
        needs = [self._similarity()]
        aux = self._aux()
        if aux is not None:
            needs.append(aux)
        if self.min_positions or self.scale == "positions":
            needs.append(Need.of("positions", site=self.site))
        return tuple(needs)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return super().scopes if self.pool == "global" else ("global",)

    def _similarity(self) -> Need:
        return Need.of("similarity", site=self.site, metric=self.metric, per_image=self.per_image, ema=self.ema)

    def _aux(self) -> Need | None:
        if self.aux == "edge":
            relative = self.aux_scale == "z"
            padding = self.edge_padding
            return Need.of("texture", site=self.site, padding=padding, relative=relative, ema=self.ema)
        if self.aux == "gated":
            return Need.of("gated_gradient", ema=self.ema)
        return Need("gate") if self.aux == "taylor" else None

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        if self.min_positions:
            positions = int(stats.collected(Need.of("positions", site=self.site), group))
            if positions < self.min_positions:
                _log.info("%s: maps of %d positions are too small for sirfp; ranked by L1 norm", group.id, positions)
                largest = {"positions": group.channels / positions, "none": float(group.channels)}.get(self.scale, 1.0)
                return largest * _by_norm(group, stats)
        order, v = redundancy(stats.collected(self._similarity(), group), diag=self.diag)
        if not self.diag:
            v[order[-2:]] = v[order[-2:]].mean()  # the last two are equally redundant, whichever number goes first
        v = self._scaled(order, v, stats, group)
        unit = v.max() if self.aux_scale == "z" and self.scale in ("positions", "none") else 1.0  # z has no unit, v has
        return self._weight(group) * self._auxiliary(group, stats) * unit - v

    def _scaled(self, order: Tensor, v: Tensor, stats: Stats, group: Group) -> Tensor:
        import torch

        if self.scale == "positions":
            return v / stats.collected(Need.of("positions", site=self.site), group)
        if self.scale == "max":
            return normalized(v, "max")
        if self.scale == "alive":
            others = torch.empty_like(v)
            others[order] = torch.arange(len(v) - 1, -1, -1, dtype=v.dtype, device=v.device)
            return v / others.clamp(min=1)
        return v

    def _auxiliary(self, group: Group, stats: Stats) -> Tensor | float:
        need = self._aux()
        if need is None:
            return 0.0
        value = stats.collected(need, group)
        value = value.clamp(min=0).sqrt() if self.aux == "taylor" else value
        return z_score(value) if self.aux_scale == "z" else value

    def _weight(self, group: Group) -> float:
        return self.lam if self.lam_head is None or in_backbone(group.id) else self.lam_head

    def compare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.pool == "group":
            return {name: rank_in_group(value) for name, value in scores.items()}
        return pooled(scores) if self.pool == "backbone_head" else scores


def _by_norm(group: Group, stats: Stats) -> Tensor:
    return normalized(stats.filter_sums(group, 1), "max") - 1


def greedy_penalty(norm: Tensor, correlation: Tensor, *, lam: float, tau: float, redundancy: Redundancy) -> Tensor:
    """(C,) the value norm - lam * redundancy of each channel when it is the lowest of those left and goes.

    Redundancy, the largest or the mean over the C - 1 others, counts those left alone, so of two equal channels the
    second is judged by its norm again. Values never fall along the order of removal: keeping the K highest is keeping
    the last K.

    Args:
        norm: (C,) in [0, 1].
        correlation: (C, C) in [-1, 1].
        lam, redundancy: weight and kind of the penalty.
        tau: correlations up to this do not count; above, (|rho| - tau) / (1 - tau).
    """
    import torch

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
    import torch

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
        if self.correlation == "outer":
            return (Need.of("mean", site=self.site),)
        return (Need.of("similarity", site=self.site, metric="pearson"),)

    def __call__(self, group: Group, stats: Stats) -> Tensor:
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
