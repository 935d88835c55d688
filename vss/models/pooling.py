"""2x2 max pooling that remembers where its maxima were, and the unpooling that puts them back.

In torch both use flat int32 indices (`vss.ops.max_pool_indices`), which TensorRT cannot import (MaxPool with Indices,
MaxUnpool, Scatter). While a network is being exported the same values come from plain operators: the position of a
maximum inside its 2x2 window is an ArgMax over the four phases of the image, and unpooling writes each value to its
phase and zero to the other three. The two forms agree exactly, ties included, at even and odd sizes (the last row or
column of an odd size is in no window).
One graph for many sizes needs sides that are always even here, since the exporter cannot express the cut of an odd one:
a network that uses this sets `SegModel.dynamic_multiple`. With `vss.ops.onnx_nodes.plugin_nodes` an export gets the
nodes VssMaxPool and VssMaxUnpool instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vss import ops
from vss.ops import onnx_nodes


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (N, C, H, W) float. Returns the maxima (N, C, H//2, W//2) and what `max_unpool` needs, of the same shape."""
    if onnx_nodes.writes_nodes():
        return onnx_nodes.max_pool_node(x)
    if torch.compiler.is_exporting():
        return max_pool_phases(x)
    if x.dtype == torch.float64:  # the op has none; torch's indices are int64, by which `max_unpool` knows them
        return F.max_pool2d(x, 2, stride=2, return_indices=True)
    return ops.max_pool_indices(x)


def max_unpool(x: Tensor, indices: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Put (N, C, h, w) values back to where `max_pool` found its maxima; zero elsewhere.

    `size` is that of the pooled tensor; its last two entries H and W count: H//2 == h, W//2 == w.
    """
    if onnx_nodes.writes_nodes():
        return onnx_nodes.max_unpool_node(x, indices, size)
    if torch.compiler.is_exporting():
        return max_unpool_phases(x, indices, size)
    sides = [int(side) for side in size[-2:]]
    if indices.dtype == torch.int64:
        return F.max_unpool2d(x, indices, (2, 2), stride=(2, 2), output_size=sides)
    return ops.max_unpool(x, indices, sides)


def max_pool_phases(x: Tensor) -> tuple[Tensor, Tensor]:
    """`max_pool` by plain operators; the second result is the phase 2*row + column of each maximum, int64 in 0..3."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    even = x[..., : 2 * height, : 2 * width]
    phases = F.pixel_unshuffle(even, 2).reshape(x.shape[0], x.shape[1], 4, height, width)
    return F.max_pool2d(x, 2, stride=2), phases.argmax(dim=2)


def max_unpool_phases(x: Tensor, phase: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """`max_unpool` by plain operators, from what `max_pool_phases` returned."""
    count, channels, height, width = x.shape
    here = phase.unsqueeze(2) == torch.arange(4, device=x.device).reshape(1, 1, 4, 1, 1)
    phases = torch.where(here, x.unsqueeze(2), torch.zeros((), dtype=x.dtype, device=x.device))
    even = F.pixel_shuffle(phases.reshape(count, 4 * channels, height, width), 2)
    rows, columns = size[-2] - 2 * height, size[-1] - 2 * width
    return F.pad(even, (0, columns, 0, rows)) if rows or columns else even
