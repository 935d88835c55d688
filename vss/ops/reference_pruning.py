"""Schemas, Python references and fakes of the ops that score channels. Slow, obvious, the kernels' oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vss.ops.reference import check, check_extra, check_float, check_int32, check_maps, check_same_device, define

# greedy_order ---------------------------------------------------------------------------------------------------------

MAX_CHANNELS = 65536


def _check_greedy_order(similarity: Sequence[Tensor]) -> None:
    op = "greedy_order"
    check(len(similarity) > 0, f"{op}: at least one similarity matrix is needed, got none.")
    for a in similarity:
        shape = list(a.shape)
        check(
            a.dim() == 2 and a.shape[0] == a.shape[1], f"{op}: a similarity matrix must be (C, C), got shape {shape}."
        )
        check(
            1 <= a.shape[0] <= MAX_CHANNELS,
            f"{op}: a similarity matrix must have 1 to {MAX_CHANNELS} channels, got {a.shape[0]}.",
        )
        check(a.dtype == torch.float32, f"{op}: a similarity matrix must be float32, got {a.dtype}.")
        check_same_device(op, similarity[0], a)


def _greedy_one(a: Tensor) -> tuple[Tensor, Tensor]:
    count = a.shape[0]
    sums, alive = a.double().sum(1), torch.ones(count, dtype=torch.bool, device=a.device)
    order, value = torch.empty(count, dtype=torch.int64, device=a.device), torch.empty_like(sums)
    for step in range(count):
        left = alive.nonzero()[:, 0]
        k = left[sums[left].argmax()]
        order[step], value[k], alive[k] = k, sums[k], False
        sums -= a[k].double()
    return order, value


def greedy_order(similarity: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Reference of `vss.ops.greedy_orders`: the incremental form, one matrix after the other; results concatenated."""
    _check_greedy_order(similarity)
    orders, values = zip(*map(_greedy_one, similarity), strict=True)
    return torch.cat(orders), torch.cat(values)


def _greedy_order_fake(similarity: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check_greedy_order(similarity)
    total = sum(a.shape[0] for a in similarity)
    return similarity[0].new_empty(total, dtype=torch.int64), similarity[0].new_empty(total, dtype=torch.float64)


define("greedy_order(Tensor[] similarity) -> (Tensor order, Tensor value)", greedy_order, _greedy_order_fake)


# map_stats ------------------------------------------------------------------------------------------------------------

STATS = ("abs_sum", "sum", "square_sum", "positive_sum", "negative_sum", "edge_sum", "edge_square_sum")
_SOBEL = ((-0.5, 0.0, 0.5), (-1.0, 0.0, 1.0), (-0.5, 0.0, 0.5))


def _check_map_stats(x: Tensor, padding: str) -> None:
    op = "map_stats"
    check_maps(op, "x", "(B, C, H, W)", x)
    check(x.shape[2] >= 1 and x.shape[3] >= 1, f"{op}: x has no positions, got shape {list(x.shape)}.")
    check(padding in ("replicate", "zeros"), f"{op}: padding must be 'replicate' or 'zeros', got {padding!r}.")


def _edges(x: Tensor, padding: str) -> Tensor:
    """Sobel magnitude of float maps (B, C, H, W)."""
    batch, channels, height, width = x.shape
    flat = x.reshape(batch * channels, 1, height, width)
    padded = F.pad(flat, (1, 1, 1, 1), mode="replicate" if padding == "replicate" else "constant")
    kernel = torch.tensor(_SOBEL, dtype=x.dtype, device=x.device)
    both = F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])
    return both.square().sum(1).sqrt().view(x.shape)


def map_stats(x: Tensor, padding: str = "replicate") -> Tensor:
    """Reference of `vss.ops.map_stats`: one pass over the maps per statistic, in float32."""
    _check_map_stats(x, padding)
    values = x.float()
    if x.shape[0] * x.shape[1] == 0:
        return values.new_empty((*x.shape[:2], len(STATS)))
    edges = _edges(values, padding)
    columns = (
        values.abs(),
        values,
        values.square(),
        values.clamp(min=0),
        (-values).clamp(min=0),
        edges,
        edges.square(),
    )
    return torch.stack([column.double().sum((2, 3)).float() for column in columns], 2)


def _map_stats_fake(x: Tensor, padding: str = "replicate") -> Tensor:
    _check_map_stats(x, padding)
    return x.new_empty((x.shape[0], x.shape[1], len(STATS)), dtype=torch.float32)


define("map_stats(Tensor x, str padding='replicate') -> Tensor", map_stats, _map_stats_fake)


# gram_accumulate ------------------------------------------------------------------------------------------------------


def _check_gram(total: Tensor, x: Tensor, norms: Tensor | None, means: Tensor | None) -> None:
    op = "gram_accumulate"
    check_maps(op, "x", "(B, C, H, W)", x)
    batch, channels = x.shape[:2]
    check(
        tuple(total.shape) == (channels, channels) and total.dtype == torch.float32 and total.is_contiguous(),
        f"{op}: total must be a contiguous float32 matrix of shape {[channels, channels]}, "
        f"got {total.dtype} of shape {list(total.shape)}.",
    )
    check_same_device(op, x, total)
    for name, extra, shape in (("norms", norms, (batch, channels)), ("means", means, (channels,))):
        if extra is None:
            continue
        check_extra(op, name, extra, x, shape)


def gram_accumulate(total: Tensor, x: Tensor, norms: Tensor | None = None, means: Tensor | None = None) -> None:
    """Reference of `vss.ops.gram_accumulate`: one image after the other, a scaled copy of each."""
    _check_gram(total, x, norms, means)
    for b in range(x.shape[0]):
        rows = x[b].float().flatten(1)
        rows = rows if means is None else rows - means[:, None]
        rows = rows if norms is None else rows / norms[b, :, None]
        total.addmm_(rows, rows.T)


def _gram_fake(total: Tensor, x: Tensor, norms: Tensor | None = None, means: Tensor | None = None) -> None:
    _check_gram(total, x, norms, means)


define(
    "gram_accumulate(Tensor(a!) total, Tensor x, Tensor? norms=None, Tensor? means=None) -> ()",
    gram_accumulate,
    _gram_fake,
)


# channel_reduce -------------------------------------------------------------------------------------------------------

_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda w, g: w.abs(),
    "l2": lambda w, g: w.square(),
    "product": lambda w, g: w * g,
    "abs_product": lambda w, g: (w * g).abs(),
}
REDUCTIONS = tuple(_TERMS)


def _check_channel_reduce(weights: Sequence[Tensor], grads: Sequence[Tensor], dims: Sequence[int], mode: str) -> None:
    op = "channel_reduce"
    check(mode in _TERMS, f"{op}: mode must be 'l1', 'l2', 'product' or 'abs_product', got {mode!r}.")
    check(
        len(dims) == len(weights),
        f"{op}: one dim per weight is needed, got {len(weights)} weights and {len(dims)} dims.",
    )
    needed = len(weights) if "product" in mode else 0
    check(len(grads) == needed, f"{op}: the mode needs {needed} gradients, got {len(grads)}.")
    check(len(weights) > 0, f"{op}: at least one weight is needed, got none.")
    for w, dim in zip(weights, dims, strict=True):
        check_float(op, "a weight", w)
        check_int32(op, "a weight", w)
        check(
            w.dtype == weights[0].dtype,
            f"{op}: all weights must have one dtype, got {weights[0].dtype} and {w.dtype}.",
        )
        check_same_device(op, weights[0], w)
        check(0 <= dim < w.dim(), f"{op}: dim {dim} is outside a weight of shape {list(w.shape)}.")
        check(w.shape[dim] >= 1, f"{op}: a weight has no channels along dim {dim}, got shape {list(w.shape)}.")
    for w, g in zip(weights, grads, strict=False):
        check(
            g.shape == w.shape and g.dtype == w.dtype,
            f"{op}: a gradient must match its weight, got {g.dtype} of shape {list(g.shape)} "
            f"for {w.dtype} of shape {list(w.shape)}.",
        )
        check_same_device(op, w, g)


def channel_reduce(weights: Sequence[Tensor], grads: Sequence[Tensor], dims: Sequence[int], mode: str) -> Tensor:
    """Reference of `vss.ops.channel_reduce`: one layer after the other; results concatenated."""
    _check_channel_reduce(weights, grads, dims, mode)
    sums = []
    for i, (w, dim) in enumerate(zip(weights, dims, strict=True)):
        rows = w.float().movedim(dim, 0).flatten(1) if w.dim() > 1 else w.float()[:, None]
        others = grads[i].float().movedim(dim, 0).reshape(rows.shape) if grads else rows
        total = _TERMS[mode](rows, others).double().sum(1)
        sums.append(total.sqrt() if mode == "l2" else total)
    return torch.cat(sums).float()


def _channel_reduce_fake(weights: Sequence[Tensor], grads: Sequence[Tensor], dims: Sequence[int], mode: str) -> Tensor:
    _check_channel_reduce(weights, grads, dims, mode)
    total = sum(w.shape[dim] for w, dim in zip(weights, dims, strict=True))
    return weights[0].new_empty(total, dtype=torch.float32)


define(
    "channel_reduce(Tensor[] weights, Tensor[] grads, int[] dims, str mode) -> Tensor",
    channel_reduce,
    _channel_reduce_fake,
)


# channel_moments ------------------------------------------------------------------------------------------------------

MOMENTS = ("product_sum", "abs_product_sum", "abs_activation_sum", "gradient_sum")


def _check_channel_moments(activation: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
    op = "channel_moments"
    check_maps(op, "activation", "(B, C, H, W)", activation)
    check(
        gradient.shape == activation.shape and gradient.dtype == activation.dtype,
        f"{op}: gradient must match activation, got {gradient.dtype} of shape {list(gradient.shape)} "
        f"for {activation.dtype} of shape {list(activation.shape)}.",
    )
    check_same_device(op, activation, gradient)
    if mask is not None:
        check_extra(op, "mask", mask, activation, (activation.shape[0], *activation.shape[2:]))


def channel_moments(activation: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """Reference of `vss.ops.channel_moments`: one product map per column, in float32."""
    _check_channel_moments(activation, gradient, mask)
    a, g = activation.float(), gradient.float()
    weight = torch.ones((), device=a.device) if mask is None else mask[:, None]
    columns = (a * g * weight, (a * g).abs() * weight, a.abs() * weight, g * weight)
    return torch.stack([column.double().sum((2, 3)).float() for column in columns], 2)


def _channel_moments_fake(activation: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    _check_channel_moments(activation, gradient, mask)
    return activation.new_empty((*activation.shape[:2], len(MOMENTS)), dtype=torch.float32)


define(
    "channel_moments(Tensor activation, Tensor gradient, Tensor? mask=None) -> Tensor",
    channel_moments,
    _channel_moments_fake,
)
