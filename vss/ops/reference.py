"""Schemas, Python references and fakes of every op: the ops exist without a compiler.

A reference is registered as `CompositeExplicitAutograd`, so the dispatcher runs it on every device for which no native
kernel is loaded. It is slow, obvious, and the oracle of the native kernels; both raise the same messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vss.errors import VssError

_LIBRARY = torch.library.Library("vss", "DEF")
_INT32_MAX = 2**31 - 1
MAX_CLASSES = 256


def _define(schema: str, reference: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vss::{name}", fake, lib=_LIBRARY)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise VssError(message)


def _check_float(op: str, name: str, x: Tensor) -> None:
    _check(
        x.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"{op}: {name} must be float32, float16 or bfloat16, got {x.dtype}; convert it with {name}.float().",
    )


def _check_dim(op: str, name: str, layout: str, x: Tensor, dim: int) -> None:
    _check(x.dim() == dim, f"{op}: {name} must be {layout}, got shape {list(x.shape)}.")


def _check_same_device(op: str, first: Tensor, other: Tensor) -> None:
    _check(
        first.device == other.device,
        f"{op}: all tensors must be on one device, got {first.device} and {other.device}.",
    )


# seg_argmax ----------------------------------------------------------------------------------------------------------


def _check_seg_argmax(logits: Tensor, size: Sequence[int]) -> None:
    op = "seg_argmax"
    _check_dim(op, "logits", "(N, K, h, w)", logits, 4)
    _check_float(op, "logits", logits)
    classes = logits.shape[1]
    _check(
        1 <= classes <= MAX_CLASSES,
        f"{op}: labels are uint8, so logits must have 1 to {MAX_CLASSES} classes, got {classes}.",
    )
    _check(
        logits.shape[2] >= 1 and logits.shape[3] >= 1, f"{op}: logits has no pixels, got shape {list(logits.shape)}."
    )
    _check(
        len(size) == 2 and min(size) >= 1 and max(size) <= _INT32_MAX,
        f"{op}: size must be two positive integers (H, W), got {list(size)}.",
    )


def seg_argmax(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Reference of `vss.ops.seg_argmax`: the resized scores exist in full, in float32."""
    _check_seg_argmax(logits, size)
    scores = F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=align_corners)
    return scores.argmax(1).to(torch.uint8)


def _seg_argmax_fake(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    _check_seg_argmax(logits, size)
    return logits.new_empty((logits.shape[0], size[0], size[1]), dtype=torch.uint8)


_define(
    "seg_argmax(Tensor logits, SymInt[2] size, bool align_corners=False) -> Tensor",
    seg_argmax,
    _seg_argmax_fake,
)


# greedy_order ---------------------------------------------------------------------------------------------------------

MAX_CHANNELS = 65536


def _check_greedy_order(similarity: Sequence[Tensor]) -> None:
    op = "greedy_order"
    for a in similarity:
        shape = list(a.shape)
        _check(
            a.dim() == 2 and a.shape[0] == a.shape[1], f"{op}: a similarity matrix must be (C, C), got shape {shape}."
        )
        _check(
            1 <= a.shape[0] <= MAX_CHANNELS,
            f"{op}: a similarity matrix must have 1 to {MAX_CHANNELS} channels, got {a.shape[0]}.",
        )
        _check(a.dtype == torch.float32, f"{op}: a similarity matrix must be float32, got {a.dtype}.")
        _check_same_device(op, similarity[0], a)


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


_define("greedy_order(Tensor[] similarity) -> (Tensor order, Tensor value)", greedy_order, _greedy_order_fake)


# map_stats ------------------------------------------------------------------------------------------------------------

STATS = ("abs_sum", "sum", "square_sum", "positive_sum", "negative_sum", "edge_sum", "edge_square_sum")
_SOBEL = ((-0.5, 0.0, 0.5), (-1.0, 0.0, 1.0), (-0.5, 0.0, 0.5))


def _check_map_stats(x: Tensor, padding: str) -> None:
    op = "map_stats"
    _check_dim(op, "x", "(B, C, H, W)", x, 4)
    _check_float(op, "x", x)
    _check(x.shape[2] >= 1 and x.shape[3] >= 1, f"{op}: x has no positions, got shape {list(x.shape)}.")
    _check(padding in ("replicate", "zeros"), f"{op}: padding must be 'replicate' or 'zeros', got {padding!r}.")


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


_define("map_stats(Tensor x, str padding='replicate') -> Tensor", map_stats, _map_stats_fake)
