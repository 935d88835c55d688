"""Fast tensor operations: a native kernel where the extension `vss._C` is built, else a Python reference.

The dispatcher picks the kernel; `status()` says which one runs where, and reports record it. Every op accepts float32,
float16 and bfloat16 in any strides, accumulates in float32 or better, and raises `ValueError` with a full sentence.
Values are not differentiable unless the op says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vss.ops import reference

__all__ = [
    "NAMES",
    "STATS",
    "build_info",
    "greedy_order",
    "greedy_orders",
    "load_error",
    "map_stats",
    "reference",
    "seg_argmax",
    "status",
]

NAMES = ("greedy_order", "map_stats", "seg_argmax")
STATS = reference.STATS


def _load() -> tuple[dict[str, Any] | None, str | None]:
    """Import `vss._C`: its build facts, or None and why an extension that is there cannot be used."""
    if importlib.util.find_spec("vss._C") is None:
        return None, None
    try:
        return dict(importlib.import_module("vss._C").BUILD), None
    except ImportError as error:
        reason = f"vss._C cannot be loaded ({error}); rebuild it against torch {torch.__version__}: pip install -e ."
        warnings.warn(f"{reason} Every op runs its Python reference.", RuntimeWarning, stacklevel=2)
        return None, reason


_BUILD, _LOAD_ERROR = _load()


def build_info() -> dict[str, Any] | None:
    """How `vss._C` was built: compiler, torch, openmp, cuda, architectures, cpu_clones. None where it is not loaded."""
    return None if _BUILD is None else dict(_BUILD)


def load_error() -> str | None:
    """Why an extension that exists could not be loaded, with the fix; None where all is well or nothing is built."""
    return _LOAD_ERROR


def status() -> dict[str, dict[str, str]]:
    """Per op and device ("CPU", "CUDA"): "native" or "reference", as the dispatcher has it registered."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: {key: "native" if has(f"vss::{name}", key) else "reference" for key in ("CPU", "CUDA")} for name in NAMES
    }


def seg_argmax(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Class of every pixel: bilinear resize of scores, then argmax over classes; the resized scores never exist.

    logits: (N, K, h, w) float32, float16 or bfloat16, any strides, 1 <= K <= 256
    size: (H, W) of the labels
    returns: (N, H, W) uint8 in 0..K-1, contiguous

    Equal to `F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners).argmax(1)` up to the
    rounding of float32 sums: labels may differ where the two best scores agree to about 1e-6 of their size. The lowest
    class wins an exact tie; a NaN counts as the largest value, as in `torch.argmax`.
    """
    return torch.ops.vss.seg_argmax(logits, size, align_corners)


def greedy_order(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy redundancy elimination: remove the channel with the largest sum of similarities to those left, C times.

    similarity: (C, C) float32, symmetric (row k is read for column k); a diagonal that is not 0 counts
    returns: order (C,) int64, order[t] is removed at step t; value (C,) float64, value[c] is c's sum when removed

    O(C^2) with float64 sums; a tie goes to the lowest index, a NaN counts as the largest value. The elimination of
    SIRFP (AAAI 2025), which forms all sums anew at every step.
    """
    order, value = torch.ops.vss.greedy_order([similarity])
    return order, value


def greedy_orders(similarity: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`greedy_order` of several matrices in one call: one launch on CUDA, shared out among threads on CPU."""
    if not similarity:
        return []
    sizes = [a.shape[0] for a in similarity]
    order, value = torch.ops.vss.greedy_order(list(similarity))
    return list(zip(order.split(sizes), value.split(sizes), strict=True))


def map_stats(x: Tensor, *, padding: str = "replicate") -> Tensor:
    """Sums over every feature map, in one read of x: what norms, means, FGP and SIRFP's edge term need.

    x: (B, C, H, W) float32, float16 or bfloat16, any strides
    padding: "replicate" or "zeros" around a map for the edge columns (SIRFP pads with zeros and so sees false edges)
    returns: (B, C, 7) float32, columns `STATS`: sums of |x|, x, x^2, max(x, 0), max(-x, 0), M, M^2

    M is the Sobel magnitude sqrt(gx^2 + gy^2) with [[-.5 0 .5] [-1 0 1] [-.5 0 .5]] and its transpose. Sums are float32
    within a row (CPU) or a thread's strip (CUDA) and float64 beyond. NaN and infinity propagate.
    """
    return torch.ops.vss.map_stats(x, padding)
