"""The other side of every benchmark: the same result in plain torch, as published procedures and users write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def seg_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners).argmax(1)


def greedy_order(similarity: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The published elimination: every step sums the whole matrix of what is left and sorts the sums."""
    results = []
    for given in similarity:
        left, count = given.clone(), given.shape[0]
        order, value = torch.empty(count, dtype=torch.int64), torch.empty(count)
        alive = torch.ones(count, dtype=torch.bool)
        for step in range(count):
            sums = left.sum(1).masked_fill(~alive, -torch.inf)
            k = int(sums.sort(descending=True)[1][0])
            order[step], value[k], alive[k] = k, sums[k], False
            left[k, :] = 0
            left[:, k] = 0
        results.append((order, value))
    return results


PLAIN: dict[str, Callable[..., object]] = {"greedy_order": greedy_order, "seg_argmax": seg_argmax}
