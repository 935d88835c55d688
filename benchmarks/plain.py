"""The other side of every benchmark: the same result in plain torch, as published procedures and users write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def seg_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners).argmax(1)


def greedy_order(similarity: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Published, O(C^3): every step gathers the matrix of what is left, sums its rows and sorts the sums."""
    results = []
    for given in similarity:
        count, left = given.shape[0], torch.arange(given.shape[0], device=given.device)
        order, value = torch.empty_like(left), given.new_empty(count)
        for step in range(count):
            sums = given[left][:, left].sum(1)
            at = sums.sort(descending=True, stable=True)[1][0]
            order[step] = left[at]
            value[left[at]] = sums[at]
            left = torch.cat((left[:at], left[at + 1 :]))
        results.append((order, value))
    return results


def greedy_order_incremental(similarity: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """O(C^2) in torch: the sums are kept, and the removed row is taken from them."""
    results = []
    for given in similarity:
        sums, order = given.double().sum(1), torch.empty(given.shape[0], dtype=torch.int64, device=given.device)
        value = torch.empty_like(sums)
        for step in range(given.shape[0]):
            k = sums.argmax()
            order[step] = k
            value[k] = sums[k]
            sums[k] = -torch.inf
            sums -= given[k]
        results.append((order, value))
    return results


def channel_reduce(weights: list[Tensor], grads: list[Tensor], dims: list[int], mode: str) -> list[Tensor]:
    """Layer by layer, as torch-pruning's magnitude and Taylor importances write it."""
    sums = []
    for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
        rows = weight.transpose(0, dim).reshape(weight.shape[dim], -1)
        if mode in ("l1", "l2"):
            total = rows.abs().pow(1 if mode == "l1" else 2).sum(1)
            sums.append(total if mode == "l1" else total.sqrt())
            continue
        product = rows * grads[i].transpose(0, dim).reshape(rows.shape)
        sums.append((product.abs() if mode == "abs_product" else product).sum(1))
    return sums


def gram_accumulate(total: Tensor, x: Tensor, norms: Tensor, means: None) -> Tensor:
    """Published: normalise a copy of the maps, one matrix per image in a (B, C, C) buffer, then their mean."""
    rows = x.flatten(2) / norms[:, :, None]
    each = torch.empty(x.shape[0], x.shape[1], x.shape[1])
    for b in range(x.shape[0]):
        each[b] = rows[b] @ rows[b].T
    return total + each.mean(0).to(total.device)


def gram_accumulate_in_place(total: Tensor, x: Tensor, norms: Tensor, means: None) -> None:
    """Image after image into the matrix: no buffer of matrices, no copy of all maps."""
    for b in range(x.shape[0]):
        rows = x[b].float().flatten(1) / norms[b, :, None]
        total.addmm_(rows, rows.T)


def gram_accumulate_batched(total: Tensor, x: Tensor, norms: Tensor, means: None) -> None:
    """All images at once: a scaled copy of all maps, one batched product, a (B, C, C) buffer."""
    rows = x.float().flatten(2) / norms[:, :, None]
    total.add_(torch.bmm(rows, rows.mT).sum(0))


def map_stats(x: Tensor, padding: str) -> tuple[Tensor, ...]:
    """Norm, sums and edge statistics one after the other; edges by two depthwise convolutions."""
    kernel = torch.tensor([[-0.5, 0.0, 0.5], [-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5]], dtype=x.dtype, device=x.device)
    channels = x.shape[1]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate" if padding == "replicate" else "constant")
    gx = F.conv2d(padded, kernel.expand(channels, 1, 3, 3), groups=channels)
    gy = F.conv2d(padded, kernel.T.expand(channels, 1, 3, 3), groups=channels)
    edge = (gx.square() + gy.square()).sqrt()
    sums = (x.abs(), x, x.square(), x.clamp(min=0), (-x).clamp(min=0), edge, edge.square())
    return tuple(values.sum((2, 3)) for values in sums)


def channel_moments(activation: Tensor, gradient: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    product = activation * gradient
    maps = (product, product.abs(), activation.abs(), gradient)
    return tuple((m if mask is None else m * mask[:, None]).sum((2, 3)) for m in maps)


def max_pool_indices(x: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(x, kernel, return_indices=True)


def max_unpool(values: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Its indices must be int64; turning them is part of the call."""
    return F.max_unpool2d(values, indices.long(), 2, output_size=size)


PLAIN: dict[str, Callable[..., object]] = {
    "channel_moments": channel_moments,
    "channel_reduce": channel_reduce,
    "gram_accumulate": gram_accumulate,
    "greedy_order": greedy_order,
    "map_stats": map_stats,
    "max_pool_indices": max_pool_indices,
    "max_unpool": max_unpool,
    "seg_argmax": seg_argmax,
}

# What else a user would write: `torch` (the best of eager torch, where the published procedure wastes more than speed),
# `baddbmm` (batched cuBLAS), `no_indices` (pooling that forgets where its maxima were, which is all that an engine's
# pooling does: torch has no binding to cuDNN's).
OTHERS: dict[str, dict[str, Callable[..., object]]] = {
    "gram_accumulate": {"torch": gram_accumulate_in_place, "baddbmm": gram_accumulate_batched},
    "greedy_order": {"torch": greedy_order_incremental},
    "max_pool_indices": {"no_indices": lambda x, kernel: F.max_pool2d(x, kernel)},
}

# Ops whose plain form torch.compile fuses into fewer passes.
FUSED = ("channel_moments", "map_stats", "max_pool_indices", "seg_argmax")

# One read of the same maps.
PASS: dict[str, Callable[..., object]] = {"map_stats": lambda x, padding: x.abs().sum()}
