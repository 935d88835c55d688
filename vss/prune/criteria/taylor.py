"""First-order Taylor importance on channel gates (Molchanov et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.plan import Group
from vss.prune.stats import Need, Stats, gate_slots
from vss.prune.stats.taps import norm_slots

Variant = Literal["gate", "examples", "bn", "gamma", "filter_square", "filter_abs"]


@CRITERIA.register("taylor", aliases=["bn_taylor"])
@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Mean over batches of the squared derivative of the loss by a factor on the channel.

    Ranked globally without normalisation, as published. The squared sum over coupled members is one joint perturbation.

    Args:
        variant: "gate" (22 in the published code, its best); "examples" squares every image's derivative (23); "bn"
            takes gamma and beta of norm layers and has nothing to say about layers without (31; the published code
            loses beta, see "gamma"); "gamma" takes gamma alone; "filter_square" is the sum over filters of (w * g)^2
            (0), "filter_abs" of |w * g|.
        joint: False adds the squares of coupled members instead of squaring their signed sum; for "gate", "bn" and
            "gamma".
        divide_by_members: divide by the number of norm layers that share the gate, the published scale fix for
            residual stages.
        batch_norm: "train" uses each batch's own statistics, as the published code does.
    """

    needs = ("gate", "gate_examples", "weight_gradient")
    native_ranking = "global"
    source = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"
    PRESETS = {"faithful": {"divide_by_members": True, "batch_norm": "train"}}  # noqa: RUF012

    variant: Variant = "gate"
    joint: bool = True
    divide_by_members: bool = False
    batch_norm: Literal["eval", "train"] = "eval"

    def requests(self) -> tuple[Need, ...]:
        """One collector, by variant."""
        if self.variant == "examples":
            return (Need("gate_examples"),)
        if self.variant.startswith("filter"):
            return (Need.of("weight_gradient", reduce=_FILTERS[self.variant]),)
        options = {"part": _PARTS[self.variant]} if self.variant != "gate" else {}
        return (Need.of("gate", **options, **({} if self.joint else {"joint": False})),)

    def batch_norm_mode(self) -> Literal["eval", "train"]:
        """As the option says."""
        return self.batch_norm

    def __call__(self, group: Group, stats: Stats) -> Tensor | None:
        """(C,) squared loss per gate squared; of "filter_abs" loss."""
        if self.variant in _PARTS and not norm_slots(stats.model, group):
            return None
        score = stats.collected(self.requests()[0], group)
        if self.divide_by_members:
            members = {slot.tensor.rpartition(".")[0] for slot in gate_slots(stats.model, group)}
            score = score / len(members)
        return score


_PARTS = {"bn": "norm", "gamma": "gamma"}
_FILTERS = {"filter_square": "sum_of_squares", "filter_abs": "sum_of_abs"}


# First-order Taylor importance of filters (C4 of the KSDD2 study).


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
