"""What a criterion is, and the table of them."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vss.core.errors import VssError, unknown
from vss.core.registry import Registry, checked_options
from vss.prune.stats import READS, BatchNormMode, Need, Reads

if TYPE_CHECKING:
    from torch import Tensor

    from vss.prune.budget import Rounding
    from vss.prune.plan import Group
    from vss.prune.stats.base import Stats

Normalize = Literal["none", "mean", "max", "l2", "rank", "lamp"]
Ranking = Literal["local", "global", "pools", "widths"]
Scope = Literal["global", "local", "isomorphic"]
Align = Literal["none", "tiered", "strict32"]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """Scores the channels of one group; higher is more important.

    A subclass is a frozen dataclass whose fields are its options; they are written into every plan.

    Attributes:
        needs: names of the collectors (vss.prune.stats) that it may read; of an instance, those that it does read,
            as `vss.prune.stats.Need` where they have options.
        normalize: what makes scores of different groups comparable in a global ranking: "none"; division by the
            group's "mean", "max" or "l2" norm; the "rank" within the group, in (0, 1]; or "lamp", the share of a score
            in the sum of those that are not below it.
        native_ranking: how the publication ranks: within each layer ("local"), over all layers together ("global"),
            within parts of the network ("pools"), or at searched widths ("widths"); scope "auto" of a budget follows.
        source: the paper.
        PRESETS: named sets of options; "faithful" repeats the published code, defects included.
        sparse_phase: the method assumes a training phase that drives unimportant channels to zero; without it the
            scores say little, and a run must be labelled so.
    """

    needs: ClassVar[tuple[str | Need, ...]] = ()
    normalize: ClassVar[Normalize] = "none"
    native_ranking: ClassVar[Ranking] = "local"
    source: ClassVar[str] = ""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    sparse_phase: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for option, value in checked_options(f"criterion {self.name!r}", hints, options).items():
            object.__setattr__(self, option, value)
        object.__setattr__(self, "needs", tuple(need if need.options else need.name for need in self.requests()))

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        """Returns (C,) float scores of one group, or None where the method has nothing to say about it.

        Channels of such groups are ranked above all others, by the L1 norm of their filters.
        """
        raise TypeError(f"{type(self).__name__} must define __call__")

    @property
    def name(self) -> str:
        """The registered name, or the class name where it has none."""
        return next((name for name in CRITERIA.names() if CRITERIA[name] is type(self)), type(self).__name__)

    def requests(self) -> tuple[Need, ...]:
        """The collectors that this instance reads, with their options."""
        return tuple(need if isinstance(need, Need) else Need(need) for need in type(self).needs)

    def batch_norm_mode(self) -> BatchNormMode:
        """The mode of batch norms in the calibration pass: the option `batch_norm` of a criterion that has one."""
        mode: BatchNormMode = getattr(self, "batch_norm", "eval")
        return mode

    def compare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the scores of all groups comparable; the default treats each group by `normalize`."""
        return {name: normalized(value, self.normalize) for name, value in scores.items()}

    @property
    def rounding(self) -> Rounding | None:
        """(channels, removed fraction) -> kept channels, where the method fixes widths itself; None where not."""
        return None

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes that a budget may have, the published one first; pools and searched widths are walked together."""
        if self.native_ranking == "widths":
            return ("global",)
        local = self.native_ranking == "local"
        return ("local", "global", "isomorphic") if local else ("global", "local", "isomorphic")

    def scope_of(self, asked: str) -> Scope:
        """What a budget's scope means for this criterion; one that it cannot have is refused."""
        if asked == "auto":
            return self.scopes[0]
        for scope in self.scopes:
            if scope == asked:
                return scope
        raise VssError(
            f"prune.budget.scope is {asked}, which criterion {self.name!r} cannot have: how much goes from where is "
            "part of its method; leave it at auto, or take another criterion."
        )

    def options(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


CRITERIA: Registry[type[Criterion]] = Registry("criterion")


def make_criterion(name: str, /, *, preset: str | None = None, **options: object) -> Criterion:
    """Build a criterion by name or alias, from a named set of options (`preset`) and options, which win.

    An unknown option is refused with the closest one.
    """
    kind = CRITERIA[name]
    if preset is not None:
        if preset not in kind.PRESETS:
            raise unknown(f"preset of criterion {name!r}", str(preset), kind.PRESETS)
        options = {**kind.PRESETS[preset], **options}
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise unknown(f"option of criterion {name!r}", option, [*known, "preset"])
    return kind(**options)


def method_rows() -> list[dict[str, str]]:
    """One row a criterion, from what its class says of itself."""
    rows = []
    for name in CRITERIA.names():
        kind = CRITERIA[name]
        rows.append({
            "name": name,
            "aliases": ", ".join(CRITERIA.aliases(name)),
            "needs": data_needs(make_criterion(name)),
            "sparse_phase": "yes" if kind.sparse_phase else "",
            "ranking": kind.native_ranking,
            "presets": ", ".join(kind.PRESETS),
            "source": kind.source,
        })  # fmt: skip
    return rows


def parse_methods(names: Sequence[str]) -> dict[str, Criterion]:
    """NAME or NAME:PRESET -> criterion, in order."""
    chosen = {}
    for text in names:
        name, _, preset = text.strip().partition(":")
        chosen[text.strip()] = make_criterion(name, preset=preset or None)
    return chosen


def data_needs(criterion: Criterion) -> str:
    """What a criterion must be given besides the network, in words; "weights" where that is nothing."""
    reads = [_reads_of(need.name) for need in criterion.requests()]
    words = ["images"] if reads else []
    words += ["labels"] if any(each.labels for each in reads) else []
    words += ["gradients"] if any(each.gradients for each in reads) else []
    words += ["classes"] if any(each.outputs for each in reads) else []
    return ", ".join(words) or "weights"


def _reads_of(name: str) -> Reads:
    """What the collector of that name takes from the calibration pass."""
    if name in READS:
        return READS[name]
    from vss.prune.stats.run import COLLECTORS

    kind = COLLECTORS[name]
    return Reads(kind.gradients, kind.labels, kind.outputs)


def score_groups(criterion: Criterion, groups: list[Group], stats: Stats) -> dict[str, Tensor]:
    """Group id -> (C,) float64 scores on the CPU, comparable across groups; NaN or infinity is refused by layer."""
    scores, silent = {}, []
    for group in groups:
        raw = criterion(group, stats)
        if raw is None:
            silent.append(group)
            continue
        scores[group.id] = _checked(criterion, group, raw)
    if not scores and groups:
        raise VssError(
            f"criterion {criterion.name!r} does not apply to this network: none of its layers has what the "
            "method scores; choose another criterion."
        )
    scores = criterion.compare(scores)
    top = max(float(value.max()) for value in scores.values()) if scores else 0.0
    for group in silent:
        scores[group.id] = top + 1 + normalized(_l1(group, stats), "max")
    return {group.id: scores[group.id] for group in groups}


def normalized(value: Tensor, how: Normalize) -> Tensor:
    """(C,) scores of one group in the units of a global ranking."""
    if how == "mean":
        return value / (value.mean().abs() + 1e-12)
    if how == "max":
        return value / (value.abs().max() + 1e-12)
    if how == "l2":
        return value / (value.square().sum().sqrt() + 1e-12)
    if how == "rank":
        return rank_in_group(value)
    if how == "lamp":
        return lamp(value)
    return value


def lamp(value: Tensor) -> Tensor:
    """(C,) each of the scores, which are squares, over the sum of those from it upwards; the largest is 1.

    Source: Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, equation 3.
    """
    import torch

    order = torch.argsort(value, stable=True)
    upwards = value[order].flip(0).cumsum(dim=0).flip(0)
    found = torch.empty_like(value)
    found[order] = value[order] / (upwards + 1e-300)
    return found


def rank_in_group(value: Tensor) -> Tensor:
    """(C,) ranks / C in (0, 1]; of equal scores the higher channel number ranks higher, as in the budget walk."""
    import torch

    ranks = torch.empty_like(value)
    ranks[torch.argsort(value, stable=True)] = torch.arange(1, len(value) + 1, dtype=value.dtype, device=value.device)
    return ranks / len(value)


def in_backbone(layer: str) -> bool:
    """Whether a layer is in the first of the two pools of SIRFP and DCFP."""
    return layer.startswith("backbone")


def pooled(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ranks in (0, 1] within two pools, backbone and all else, so that each loses the same fraction."""
    import torch

    ranked: dict[str, Tensor] = {}
    for names in ([n for n in scores if in_backbone(n)], [n for n in scores if not in_backbone(n)]):
        if names:
            joint = rank_in_group(torch.cat([scores[name] for name in names]))
            ranked.update(zip(names, torch.split(joint, [len(scores[name]) for name in names]), strict=True))
    return {name: ranked[name] for name in scores}


def _checked(criterion: Criterion, group: Group, raw: Tensor) -> Tensor:
    import torch

    value = raw.detach().double().cpu()
    if value.shape != (group.channels,):
        raise VssError(
            f"criterion {criterion.name!r} gave {tuple(value.shape)} scores for the {group.channels} "
            f"channels of {group.id}; it must return one a channel."
        )
    if not torch.isfinite(value).all():
        raise VssError(
            f"criterion {criterion.name!r} gave NaN or infinite scores for layer {group.id!r}; "
            "check the network's weights and the calibration images."
        )
    return value


def _l1(group: Group, stats: Stats) -> Tensor:
    import torch

    filters = any(stats.tensor(slot.tensor).ndim > 1 for slot in group.by_role("producer"))
    return stats.filter_sums(group, 1).cpu() if filters else torch.ones(group.channels)


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
