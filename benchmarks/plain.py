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


def map_stats(x: Tensor, padding: str) -> tuple[Tensor, ...]:
    """Norm, sums and edge statistics one after the other; edges by two depthwise convolutions."""
    kernel = torch.tensor([[-0.5, 0.0, 0.5], [-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5]], dtype=x.dtype)
    channels = x.shape[1]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate" if padding == "replicate" else "constant")
    gx = F.conv2d(padded, kernel.expand(channels, 1, 3, 3), groups=channels)
    gy = F.conv2d(padded, kernel.T.expand(channels, 1, 3, 3), groups=channels)
    edge = (gx.square() + gy.square()).sqrt()
    sums = (x.abs(), x, x.square(), x.clamp(min=0), (-x).clamp(min=0), edge, edge.square())
    return tuple(values.sum((2, 3)) for values in sums)


PLAIN: dict[str, Callable[..., object]] = {
    "greedy_order": greedy_order,
    "map_stats": map_stats,
    "seg_argmax": seg_argmax,
}

# The least that could be done: one pass over the same bytes.
FLOOR: dict[str, Callable[..., object]] = {"map_stats": lambda x, padding: x.abs().sum()}
