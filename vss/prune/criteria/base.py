"""What a criterion is, and the table of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vss.errors import VssError, unknown
from vss.prune.groups import Group
from vss.prune.stats import Stats
from vss.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """Scores the channels of one group; higher is more important.

    A subclass is a frozen dataclass whose fields are its options; they are written into every plan.

    Attributes:
        needs: collectors (vss.prune.stats) whose statistics it reads.
        normalize: what makes scores of different groups comparable in a global ranking: "none" or "mean".
        source: the paper.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    normalize: ClassVar[Literal["none", "mean"]] = "none"
    source: ClassVar[str] = ""

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """Returns (C,) float scores of one group."""
        raise TypeError(f"{type(self).__name__} must define __call__")

    def options(self) -> dict[str, Any]:
        """The options as JSON-able data."""
        return dataclasses.asdict(self)


CRITERIA: Registry[type[Criterion]] = Registry("criterion")


def make_criterion(name: str, **options: Any) -> Criterion:
    """Build a criterion by name; an unknown option is refused with the closest one."""
    kind = CRITERIA[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise unknown(f"option of criterion {name!r}", option, known)
    return kind(**options)


def score_groups(criterion: Criterion, groups: list[Group], stats: Stats) -> dict[str, Tensor]:
    """Group id -> (C,) float64 scores on the CPU, comparable across groups; NaN or infinity is refused by layer."""
    scores = {}
    for group in groups:
        value = criterion(group, stats).detach().double().cpu()
        if value.shape != (group.channels,):
            raise VssError(
                f"criterion {type(criterion).__name__} gave {tuple(value.shape)} scores for the {group.channels} "
                f"channels of {group.id}; it must return one a channel."
            )
        if not torch.isfinite(value).all():
            raise VssError(
                f"criterion {type(criterion).__name__} gave NaN or infinite scores for layer {group.id!r}; "
                "check the network's weights and the calibration images."
            )
        if criterion.normalize == "mean":
            value = value / (value.mean().abs() + 1e-12)
        scores[group.id] = value
    return scores
