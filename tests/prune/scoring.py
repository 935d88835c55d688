"""Calibration batches, a loss over every head, and scores by name, for the tests of criteria and statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.example import logits_of
from vss.prune import Groups, collect, make_criterion
from vss.prune.criteria import score_groups
from vss.prune.stats.base import Stats

Batch = tuple[Tensor, Tensor]


def batches_of(count: int, *, seed: int = 0, size: int = 2, side: int = 12, classes: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size, side, side), generator=generator),
        )
        for _ in range(count)
    ]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, main head and 0.4 times every other."""
    images, labels = batch
    heads = logits_of(model(images))
    return sum((1.0 if i == 0 else 0.4) * F.cross_entropy(head, labels) for i, head in enumerate(heads))


def scores_of(
    model: nn.Module,
    groups: Groups,
    name: str,
    batches: Iterable[Batch] = (),
    *,
    loss: object = mean_loss,
    seed: int = 0,
    **options: object,
) -> dict[str, Tensor]:
    criterion = make_criterion(name, **options)
    collected, _ = collect(model, list(groups), criterion.needs, batches, loss)
    return score_groups(criterion, list(groups), Stats(model, collected, seed=seed))
