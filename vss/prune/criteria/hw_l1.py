"""L1 norm with widths that hardware likes (C1 of the KSDD2 study)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vss.prune.budget import Rounding
from vss.prune.criteria.base import CRITERIA
from vss.prune.criteria.norm import L1

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
