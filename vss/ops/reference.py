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
