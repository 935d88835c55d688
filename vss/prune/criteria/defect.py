"""Activity of channels on defects (C2 of the KSDD2 study)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from vss.prune.budget import Rounding
from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.criteria.hw_l1 import Align, rounding_of
from vss.prune.groups import Group
from vss.prune.stats import Need, Stats


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
        """Activity on defects."""
        return (
            Need.of(
                "defect_activity",
                site=self.site,
                mode=self.mode,
                background=self.background,
                resize=self.resize,
                positive=None if self.positive is None else tuple(self.positive),
                ignore_index=self.ignore_index,
            ),
        )

    @property
    def rounding(self) -> Rounding | None:
        """The rule of `align`."""
        return rounding_of(self.align)

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) mean activity."""
        return stats.collected(self.requests()[0], group)
