"""Random scores: the control that every method must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vss.prune.criteria.base import CRITERIA, Criterion
from vss.prune.groups import Group
from vss.prune.stats import Stats


@CRITERIA.register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Uniform scores from a generator keyed by (seed, group id): independent of call order and of other groups."""

    source = "control"

    def __call__(self, group: Group, stats: Stats) -> Tensor:
        """(C,) uniform in [0, 1)."""
        digest = hashlib.sha256(f"{stats.seed}|{group.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(group.channels, generator=generator, dtype=torch.float64)
