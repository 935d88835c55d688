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

from vss.ops import reference as reference
from vss.ops import reference_pruning

NAMES = (
    "channel_moments",
    "channel_reduce",
    "gram_accumulate",
    "greedy_order",
    "map_stats",
    "max_pool_indices",
    "max_unpool",
    "seg_argmax",
)
STATS = reference_pruning.STATS
MOMENTS = reference_pruning.MOMENTS


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


# Where no kernel gains enough over torch's own operators, which the reference consists of.
TORCH_IS_FASTEST = {("max_unpool", "CPU")}


def status() -> dict[str, dict[str, str]]:
    """Per op and device ("CPU", "CUDA"): "native" or "reference", as the dispatcher has it registered; "torch" where no
    kernel exists because torch's own operators are as fast. `greedy_order` of a CUDA device's matrices is native on the
    host, whatever holds them."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key

    def state(name: str, key: str) -> str:
        if has(f"vss::{name}", key):
            return "native"
        return "torch" if (name, key) in TORCH_IS_FASTEST else "reference"

    return {name: {key: state(name, key) for key in ("CPU", "CUDA")} for name in NAMES}


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

    O(C^2) with float64 sums, on the host: matrices of a CUDA device are copied there, and the results back. A
    tie goes to the lowest index, a NaN counts as the largest value. The elimination of SIRFP (AAAI 2025), which forms
    all sums anew at every step.
    """
    order, value = torch.ops.vss.greedy_order([similarity])
    return order, value


def greedy_orders(similarity: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`greedy_order` of several matrices in one call, shared out among the threads of the host."""
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
    within a row (CPU) or over at most 512 values of a thread (CUDA) and float64 beyond. NaN and infinity propagate.
    """
    return torch.ops.vss.map_stats(x, padding)


def gram_accumulate(total: Tensor, x: Tensor, *, norms: Tensor | None = None, means: Tensor | None = None) -> None:
    """Add the Gram matrix of feature maps to `total`, in place: total += sum over b of Y_b Y_b^T.

    total: (C, C) float32, contiguous; symmetric before and after
    x: (B, C, H, W) float32, float16 or bfloat16, any strides
    norms: (B, C) float32, what every map is divided by; nothing is added to it, so it must not hold 0
    means: (C,) float32, subtracted before: with channel means over all images the result serves Pearson correlation

    Y_b[c, p] = (x[b, c, p] - means[c]) / norms[b, c]. Products and sums are float32. On CUDA a factor counts with 22 of
    its 24 bits, so a product is off by 2^-21 of itself at most, and sums of 32 positions are cut off to float32, not
    rounded. Only one triangle is computed, and neither a copy of x nor a matrix per image exists.
    """
    torch.ops.vss.gram_accumulate(total, x, norms, means)


def gram(x: Tensor, *, norms: Tensor | None = None, means: Tensor | None = None) -> Tensor:
    """`gram_accumulate` into a new matrix: (C, C) float32."""
    channels = x.shape[1] if x.dim() > 1 else 0
    total = torch.zeros(channels, channels, dtype=torch.float32, device=x.device)
    gram_accumulate(total, x, norms=norms, means=means)
    return total


def channel_reduce(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    *,
    mode: str,
    dims: Sequence[int] | None = None,
) -> list[Tensor]:
    """Per-channel sums over the weights of all layers of a model, in one call (one launch on CUDA).

    weights: any shapes, one dtype of float32, float16, bfloat16; memory that is not contiguous is copied first
    grads: like weights, for the modes that need them
    mode: "l1" sum |w|, "l2" sqrt(sum w^2), "product" sum w*g, "abs_product" sum |w*g|
    dims: channel axis of every weight, 0 by default (1: input channels of a convolution, outputs of a transposed one)
    returns: per weight (channels,) float32
    """
    weights = [w.detach() for w in weights]
    if not weights:
        return []
    dims = [0] * len(weights) if dims is None else list(dims)
    sums = torch.ops.vss.channel_reduce(weights, [g.detach() for g in grads], dims, mode)
    return list(sums.split([w.shape[dim] for w, dim in zip(weights, dims, strict=True)]))


def channel_moments(activation: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums of activation times gradient over every feature map, in one read of both.

    activation, gradient: (B, C, H, W) float32, float16 or bfloat16, one dtype, any strides each
    mask: (B, H, W) float32 weights of positions, 1 everywhere by default
    returns: (B, C, 4) float32, columns `MOMENTS`: sums of a*g*m, |a*g|*m, |a|*m, g*m

    The signed sum is the Taylor gate of a channel, |a*g| under a defect mask is C2, and the sum of gradients with
    `map_stats` gives FGP. NaN and infinity propagate.
    """
    return torch.ops.vss.channel_moments(activation.detach(), gradient.detach(), mask)


def max_pool_indices(x: Tensor, kernel: int = 2) -> tuple[Tensor, Tensor]:
    """Max pooling with window and stride `kernel`, and where each maximum was; differentiable.

    x: (B, C, H, W) float32, float16 or bfloat16, any strides; H and W at least `kernel`, a remainder is left out
    returns: values (B, C, H // kernel, W // kernel) of the dtype of x; indices int32, y * W + x within a map

    The first maximum in reading order wins, a NaN counts as the largest value: `F.max_pool2d(return_indices=True)` with
    half its index memory.
    """
    values, indices = torch.ops.vss.max_pool_indices(x, kernel)
    return values, indices


def max_unpool(values: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Put pooled values back where they came from, zeros elsewhere; differentiable.

    values: (B, C, h, w) float32, float16 or bfloat16; indices: int32 of the same shape, from `max_pool_indices`
    size: (H, W) of the maps that were pooled
    returns: (B, C, H, W) of the dtype of values

    An index outside its map raises on CPU; on CUDA, where that would stop the stream, its value is left out.
    """
    return torch.ops.vss.max_unpool(values, indices, size)
