"""Criteria that need a loss: Taylor importance of gates and filters, activity on defects, support of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from vss.core.errors import VssError
from vss.prune.criteria.base import CRITERIA, Align, Criterion, Scope, normalized, pooled, rounding_of
from vss.prune.stats import BatchNormMode, Need

if TYPE_CHECKING:
    from torch import Tensor

    from vss.prune.budget import Rounding
    from vss.prune.plan import Group
    from vss.prune.stats.base import Stats

Variant = Literal["gate", "examples", "bn", "gamma", "filter_square", "filter_abs"]
_PARTS = {"bn": "norm", "gamma": "gamma"}
_FILTERS = {"filter_square": "sum_of_squares", "filter_abs": "sum_of_abs"}


@CRITERIA.register("taylor", aliases=["bn_taylor"])
@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Mean over batches of the squared derivative of the loss by a factor on the channel.

    Ranked globally without normalisation, as published. The squared sum over coupled members is one joint perturbation.

    Args:
        variant: "gate" (22 in the published code, its best); "examples" squares every image's derivative (23); "bn"
            takes gamma and beta of norm layers and says nothing about layers without (31; the published code loses
            beta, see "gamma"); "gamma" takes gamma alone; "filter_square" is the sum over filters of (w * g)^2 (0),
            "filter_abs" of |w * g|.
        joint: False adds the squares of coupled members instead; for "gate", "bn" and "gamma".
        divide_by_members: divide by the number of norm layers that share the gate, the published scale fix for residual
            stages.
        batch_norm: "train" uses each batch's own statistics, as the published code does.
    """

    needs = ("gate", "gate_examples", "weight_gradient")
    native_ranking = "global"
    source = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"
    PRESETS = {"faithful": {"divide_by_members": True, "batch_norm": "train"}}  # noqa: RUF012

    variant: Variant = "gate"
    joint: bool = True
    divide_by_members: bool = False
    batch_norm: BatchNormMode = "eval"

    def requests(self) -> tuple[Need, ...]:
        if self.variant == "examples":
            return (Need("gate_examples"),)
        if self.variant.startswith("filter"):
            return (Need.of("weight_gradient", reduce=_FILTERS[self.variant]),)
        options = {"part": _PARTS[self.variant]} if self.variant != "gate" else {}
        return (Need.of("gate", **options, **({} if self.joint else {"joint": False})),)

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        """(C,) squared loss per gate squared; of "filter_abs" loss."""
        from vss.prune.stats.taps import affine_slots, norm_slots

        if self.variant in _PARTS and not norm_slots(stats.model, group):
            return None
        score = stats.collected(self.requests()[0], group)
        if self.divide_by_members:
            members = {slot.layer for slot in affine_slots(stats.model, group)}
            score = score / len(members)
        return score


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
    batch_norm: BatchNormMode = "eval"

    def requests(self) -> tuple[Need, ...]:
        return (Need.of("weight_gradient", reduce=self.reduce),)

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        return stats.collected(self.requests()[0], group)


@CRITERIA.register("obd", aliases=["fisher", "group_hessian"])
@dataclass(frozen=True, kw_only=True)
class Obd(Criterion):
    """Half the sum of F w^2 over all weights that leave with a channel, F the diagonal of Fisher's matrix in place of
    the Hessian's: what the loss gains, to second order and without cross terms, when they go.

    Ranked globally without normalisation, a loss being comparable. F is the mean square of batch gradients, so that of
    single images wants `prune.batch_size` 1; of larger batches scores are smaller and noisier, of about one order.
    """

    needs = ("fisher",)
    native_ranking = "global"
    source = "LeCun et al., Optimal Brain Damage, NIPS 1989; with Fisher: Theis et al., 2018 (arXiv 1801.05787)"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        return stats.collected(self.requests()[0], group) / 2


@CRITERIA.register("dcfp", aliases=["eic"])
@dataclass(frozen=True, kw_only=True)
class Dcfp(Criterion):
    """|g_gamma| of a group's norm layers, averaged over the batches in which shrinking gamma lowers the loss.

    Keeping one sign of the gradient keeps frequent classes, whose gradients dominate, from deciding alone. Ranked in
    two pools as published, layers whose name begins with "backbone" and all others, each losing the same fraction.
    Groups without a norm layer are not scored by the method and go last; a network without any is refused.

    Args:
        ema: decay of a moving average over batches, as published; None takes the plain mean over the batches that
            count.
        batch_norm: "train" uses each batch's own statistics, as the published code does.
    """

    needs = ("gated_gradient",)
    native_ranking = "pools"
    source = "Wang et al., DCFP: Distribution Calibrated Filter Pruning for Long-tail Semantic Segmentation, TCSVT 2024"
    PRESETS = {"faithful": {"ema": 0.99, "batch_norm": "train"}}  # noqa: RUF012

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    batch_norm: BatchNormMode = "eval"

    def requests(self) -> tuple[Need, ...]:
        return (Need.of("gated_gradient", ema=self.ema),)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return ("global",)

    def compare(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        return pooled(scores)

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        from vss.prune.stats.taps import norm_slots

        return stats.collected(self.requests()[0], group) if norm_slots(stats.model, group) else None


@CRITERIA.register("defect", aliases=["c2", "ours_c2", "defect_aware"])
@dataclass(frozen=True, kw_only=True)
class Defect(Criterion):
    """Mean over defective images of |A * dL/dA| on the defect's pixels, L the loss of the calibration pass.

    The study describes this and runs |A| of convolution outputs, without any gradient (preset "faithful"). Gradient
    multipliers of the network must be 1 while it is scored: with the training value 0 nothing arrives, and that is
    refused. A global ranking compares scores after division by the group's mean.

    Args:
        mode: "grad_act" or "act".
        site: where to look: "stream" (after the activation), "bn_out", "conv" or "mixed".
        background: subtract this times the same mean over the other pixels.
        resize: of masks to maps, "area" or "bilinear".
        positive: labels that are defects; None takes all but 0 and void.
        align: widths as in `hw_l1`.
        ignore_index: label of void pixels.
    """

    needs = ("defect_activity",)
    normalize = "mean"
    source = "KSDD2 pruning study, criterion C2"
    PRESETS = {  # noqa: RUF012
        "faithful": {"mode": "act", "site": "conv", "resize": "bilinear", "align": "tiered"}
    }

    mode: Literal["grad_act", "act"] = "grad_act"
    site: Literal["stream", "bn_out", "conv", "mixed"] = "stream"
    background: NonNegativeFloat = 0.0
    resize: Literal["area", "bilinear"] = "area"
    positive: tuple[NonNegativeInt, ...] | None = None
    align: Align = "none"
    ignore_index: int = 255

    def requests(self) -> tuple[Need, ...]:
        return (Need.of("defect_activity", **{key: value for key, value in self.options().items() if key != "align"}),)

    @property
    def rounding(self) -> Rounding | None:
        return rounding_of(self.align)

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        return stats.collected(self.requests()[0], group)


def class_shares(support: Tensor, *, exclude: tuple[int, ...] = ()) -> Tensor:
    """(classes present, C) shares q = s / sum s of each class's support; area and logit scale drop out.

    `support` is (K, C), at least 0; `exclude` are class numbers that do not count.
    """
    counts = support.sum(dim=1) > 0
    counts[[c for c in exclude if c < len(counts)]] = False
    chosen = support[counts]
    return chosen / chosen.sum(dim=1, keepdim=True)


def before_in_order(share: Tensor) -> Tensor:
    """(C,) the sum of the shares before a channel's in descending order; of equal ones the higher number first."""
    import torch

    order = torch.argsort(share, stable=True).flip(0)
    before = torch.empty_like(share)
    before[order] = share[order].cumsum(dim=0) - share[order]
    return before


@CRITERIA.register("fgp", aliases=["feature_gradient"])
@dataclass(frozen=True, kw_only=True)
class Fgp(Criterion):
    """Share of a channel in the support of a class, averaged over classes.

    The score with ranking "energy" is 1 minus the sum of the shares before the channel. Keeping every channel whose
    score is above 1 - T is the published rule "the shortest prefix with T of the energy" in every layer (T = 0.8), so
    a global budget finds the T that meets it.

    The published script cannot run; what it must have computed is rebuilt in preset "faithful": convolution outputs
    and predicted masks.

    Args:
        site: where to look: "stream" (after the activation), "bn_out", "conv" or "mixed".
        masks: pixels of a class by "truth" or as "predicted".
        classes: "mean" over classes, "min", or "mix": 0.7 mean + 0.3 min.
        ranking: "energy", or the "share" itself, divided by the group's mean.
        exclude: class numbers that do not count.
        aux_weight: factor of auxiliary heads.
        ignore_index: label of void pixels.
    """

    needs = ("class_support",)
    native_ranking = "global"
    source = "Lv et al., FGP: Feature-Gradient-Prune, 2024 (arXiv 2411.12781)"
    PRESETS = {"faithful": {"site": "conv", "masks": "predicted"}}  # noqa: RUF012

    site: Literal["stream", "bn_out", "conv", "mixed"] = "stream"
    masks: Literal["truth", "predicted"] = "truth"
    classes: Literal["mean", "min", "mix"] = "mean"
    ranking: Literal["energy", "share"] = "energy"
    exclude: tuple[NonNegativeInt, ...] = ()
    aux_weight: NonNegativeFloat = 0.4
    ignore_index: int = 255

    def requests(self) -> tuple[Need, ...]:
        return (
            Need.of(
                "class_support",
                site=self.site,
                masks=self.masks,
                aux_weight=self.aux_weight,
                ignore_index=self.ignore_index,
            ),
        )

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        import torch

        shares = class_shares(stats.collected(self.requests()[0], group), exclude=self.exclude)
        if not len(shares):
            raise VssError(
                f"no class of the calibration set is supported by layer {group.id!r}; its channels are all dead, or "
                "every class present is excluded."
            )
        mean, least = shares.mean(dim=0), shares.amin(dim=0)
        share = {"mean": mean, "min": least, "mix": 0.7 * mean + 0.3 * least}[self.classes]
        if self.ranking == "share":
            return normalized(share, "mean")
        total = share.sum()
        return 1 - before_in_order(share) / total if total > 0 else torch.zeros_like(share)
