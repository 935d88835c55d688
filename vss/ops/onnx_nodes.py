"""Nodes for ops that TensorRT has as plugins (`plugins_trt/`), written while a network is exported with `plugin_nodes`.

A node has the plugin's name and the domain `vss`; `vss.deploy.surgeon` adds a body of standard ops to the file, so
that runtimes without the plugin run it all the same. Outside of such an export nothing here is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

DOMAIN, VERSION = "vss", 1
_WANTED: ContextVar[bool] = ContextVar("vss_plugin_nodes", default=False)


@contextmanager
def plugin_nodes(wanted: bool = True) -> Iterator[None]:
    """Exports inside write plugin nodes where a network has something for them."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def writes_nodes() -> bool:
    """Whether a network is being exported with plugin nodes."""
    return _WANTED.get() and torch.compiler.is_exporting()


def seg_argmax_node(logits: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    """logits: (N, K, h, w); like: (N, C, H, W) of the same dtype. Returns labels (N, H, W) int32.

    Fixed H and W become attributes; free ones are read from `like`, which is a second input then.
    """
    height, width = like.shape[-2:]
    fixed = isinstance(height, int) and isinstance(width, int)
    attributes: dict[str, Any] = {"out_h": height, "out_w": width} if fixed else {"out_h": 0, "out_w": 0}
    attributes["align_corners"] = int(align_corners)
    inputs = (logits,) if fixed else (logits, like)
    return _nodes("VssSegArgmax", inputs, attributes, [torch.int32], [(logits.shape[0], height, width)])[0]


def max_pool_node(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (N, C, H, W). Returns the 2x2 maxima (N, C, H//2, W//2) and their places y * W + x, int32."""
    shape = (x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    maxima, places = _nodes("VssMaxPool", (x,), {"kernel": 2}, [x.dtype, torch.int32], [shape, shape])
    return maxima, places


def max_unpool_node(x: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    """x, places: (N, C, h, w); size: (..., H, W) with H//2 == h, W//2 == w. Returns (N, C, H, W), zero elsewhere."""
    height, width = size[-2:]
    attributes = {"extra_h": int(height - 2 * x.shape[2]), "extra_w": int(width - 2 * x.shape[3])}
    shape = (x.shape[0], x.shape[1], 2 * x.shape[2] + attributes["extra_h"], 2 * x.shape[3] + attributes["extra_w"])
    return _nodes("VssMaxUnpool", (x, places), attributes, [x.dtype], [shape])[0]


def _nodes(
    name: str, inputs: Sequence[Tensor], attributes: dict[str, Any], dtypes: Sequence[torch.dtype], shapes: list[Any]
) -> Sequence[Tensor]:
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs, attributes, dtypes=dtypes, shapes=shapes, version=VERSION
    )
