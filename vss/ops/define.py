"""How an op comes to exist: one schema, one reference for every device, one fake; and the checks that references share.

A reference is registered as `CompositeExplicitAutograd`, so the dispatcher runs it on every device for which no native
kernel is loaded. References and kernels raise the same messages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vss.core.errors import VssError

LIBRARY = torch.library.Library("vss", "DEF")
INT32_MAX = 2**31 - 1


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
