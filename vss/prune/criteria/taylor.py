"""First-order Taylor importance on channel gates (Molchanov et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.groups import Group
from vss.prune.stats import Stats, gate_slots


@CRITERIA.register("taylor", aliases=["bn_taylor"])
@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Mean over batches of the squared derivative of the loss by a factor on the channel.

    Ranked globally without normalisation, as published. The squared sum over coupled members is one joint perturbation.

    Args:
        divide_by_members: divide by the number of norm layers that share the gate, the published scale fix for
            residual stages.
    """

    needs = ("gate",)
    source = "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019"

    divide_by_members: bool = False

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) squared loss per gate squared."""
        score = stats.collected("gate", group)
        if self.divide_by_members:
            members = {slot.tensor.rpartition(".")[0] for slot in gate_slots(stats.model, group)}
            score = score / len(members)
        return score
