"""How an op comes to exist without a compiler: its schema, Python reference and fake, and the checks that they share.

A reference is slow, obvious, and the oracle of the native kernels. It is registered as `CompositeExplicitAutograd`, so
the dispatcher runs it on every device for which no native kernel is loaded; both raise the same messages. The ops that
score channels are in `vss.ops.reference_pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vss.core.errors import VssError

LIBRARY = torch.library.Library("vss", "DEF")
INT32_MAX = 2**31 - 1
MAX_CLASSES = 256


def define(schema: str, reference: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vss::{name}", fake, lib=LIBRARY)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise VssError(message)


def check_float(op: str, name: str, x: Tensor) -> None:
    check(
        x.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"{op}: {name} must be float32, float16 or bfloat16, got {x.dtype}; convert it with {name}.float().",
    )


def check_dim(op: str, name: str, layout: str, x: Tensor, dim: int) -> None:
    check(x.dim() == dim, f"{op}: {name} must be {layout}, got shape {list(x.shape)}.")


def check_int32(op: str, name: str, x: Tensor) -> None:
    """Sides that are known, that is no symbols of a trace, are in the range of the kernels' indices."""
    check(
        all(side <= INT32_MAX for side in x.shape if isinstance(side, int)),
        f"{op}: {name} of shape {list(x.shape)} has a side over the int32 range.",
    )


def check_maps(op: str, name: str, layout: str, x: Tensor) -> None:
    """Maps (B, C, H, W) of a known dtype, with at least one channel and sides in the int32 range."""
    check_dim(op, name, layout, x, 4)
    check_float(op, name, x)
    check_int32(op, name, x)
    check(x.shape[1] >= 1, f"{op}: {name} has no channels, got shape {list(x.shape)}.")


def check_same_device(op: str, first: Tensor, other: Tensor) -> None:
    check(
        first.device == other.device,
        f"{op}: all tensors must be on one device, got {first.device} and {other.device}.",
    )


def check_extra(op: str, name: str, extra: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """An optional float32 tensor of a known shape, on the device of `x`."""
    check(
        tuple(extra.shape) == shape and extra.dtype == torch.float32,
        f"{op}: {name} must be float32 of shape {list(shape)}, got {extra.dtype} of shape {list(extra.shape)}.",
    )
    check_same_device(op, x, extra)


# seg_argmax ----------------------------------------------------------------------------------------------------------


def _check_seg_argmax(logits: Tensor, size: Sequence[int]) -> None:
    op = "seg_argmax"
    check_dim(op, "logits", "(N, K, h, w)", logits, 4)
    check_float(op, "logits", logits)
    check_int32(op, "logits", logits)
    classes = logits.shape[1]
    check(
        1 <= classes <= MAX_CLASSES,
        f"{op}: labels are uint8, so logits must have 1 to {MAX_CLASSES} classes, got {classes}.",
    )
    check(logits.shape[2] >= 1 and logits.shape[3] >= 1, f"{op}: logits has no pixels, got shape {list(logits.shape)}.")
    check(
        len(size) == 2 and min(size) >= 1 and max(size) <= INT32_MAX,
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


define(
    "seg_argmax(Tensor logits, SymInt[2] size, bool align_corners=False) -> Tensor",
    seg_argmax,
    _seg_argmax_fake,
)


# max_pool_indices, max_unpool -----------------------------------------------------------------------------------------


def _check_map_size(op: str, height: int, width: int) -> None:
    check(
        height * width <= INT32_MAX,
        f"{op}: a map of {height}x{width} is over the int32 range of its indices.",
    )


def _check_max_pool(x: Tensor, kernel: int) -> None:
    op = "max_pool_indices"
    check_maps(op, "x", "(B, C, H, W)", x)
    check(
        kernel >= 1 and x.shape[2] >= kernel and x.shape[3] >= kernel,
        f"{op}: kernel must be at least 1 and fit into the map, got {kernel} for shape {list(x.shape)}.",
    )
    _check_map_size(op, x.shape[2], x.shape[3])


def max_pool_indices(x: Tensor, kernel: int = 2) -> tuple[Tensor, Tensor]:
    """Reference of `vss.ops.max_pool_indices`."""
    _check_max_pool(x, kernel)
    values, indices = F.max_pool2d(x.contiguous(), kernel, return_indices=True)
    return values.contiguous(), indices.to(torch.int32).contiguous()


def _max_pool_fake(x: Tensor, kernel: int = 2) -> tuple[Tensor, Tensor]:
    _check_max_pool(x, kernel)
    shape = (*x.shape[:2], x.shape[2] // kernel, x.shape[3] // kernel)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


def _check_max_unpool(values: Tensor, indices: Tensor, size: Sequence[int]) -> None:
    op = "max_unpool"
    check_maps(op, "values", "(B, C, h, w)", values)
    check(
        indices.shape == values.shape and indices.dtype == torch.int32,
        f"{op}: indices must be int32 of shape {list(values.shape)}, "
        f"got {indices.dtype} of shape {list(indices.shape)}.",
    )
    check_same_device(op, values, indices)
    check(len(size) == 2 and min(size) >= 1, f"{op}: size must be two positive integers (H, W), got {list(size)}.")
    _check_map_size(op, *size)


def max_unpool(values: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Reference of `vss.ops.max_unpool`."""
    _check_max_unpool(values, indices, size)
    height, width = size
    low, high = torch.aminmax(indices) if indices.numel() else (0, 0)
    check(bool(low >= 0 and high < height * width), f"max_unpool: an index is outside a map of {height}x{width}.")
    output = values.new_zeros((*values.shape[:2], height * width))
    return output.scatter_(2, indices.flatten(2).long(), values.flatten(2)).view(*values.shape[:2], height, width)


def _max_unpool_fake(values: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    _check_max_unpool(values, indices, size)
    return values.new_empty((*values.shape[:2], *size))


define("max_pool_indices(Tensor x, int kernel=2) -> (Tensor values, Tensor indices)", max_pool_indices, _max_pool_fake)
define("max_unpool(Tensor values, Tensor indices, SymInt[2] size) -> Tensor", max_unpool, _max_unpool_fake)


def _keep_pool(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_backward(ctx: Any, grad_values: Tensor, grad_indices: Tensor | None) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.vss.max_unpool(grad_values, indices, ctx.size), None


def _keep_unpool(ctx: Any, inputs: tuple[Tensor, Tensor, Sequence[int]], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _unpool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return grad.flatten(2).gather(2, indices.flatten(2).long()).view(indices.shape), None, None


torch.library.register_autograd("vss::max_pool_indices", _pool_backward, setup_context=_keep_pool, lib=LIBRARY)
torch.library.register_autograd("vss::max_unpool", _unpool_backward, setup_context=_keep_unpool, lib=LIBRARY)
