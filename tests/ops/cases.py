"""One table of inputs for every op, read by the tests here and by benchmarks/bench_ops.py.

A row is a shape family. `inputs()` makes fresh arguments from a fixed seed; rows with `bench` set are also timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Widths of the 45 channel groups of deeplabv3_resnet50 (torchvision, auxiliary head, classifiers kept).
DEEPLAB_GROUPS = (64,) * 7 + (128,) * 8 + (256,) * 21 + (512,) * 7 + (1024, 2048)

Args = tuple[Any, ...]
Floors = Callable[[str], Callable[..., Any]]


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    inputs: Callable[[], Args]
    bench: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Standard normal values in one of the layouts of `arrange`."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return arrange(values, layout)


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; strided takes every second element of a larger tensor."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.full([2 * s for s in x.shape], float("nan"), dtype=x.dtype)
        view = wide[tuple(slice(0, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(f"no layout {layout!r}")


def _seg(name: str, shape: tuple[int, ...], size: tuple[int, int], align: bool = False, *, bench: bool = False,
         **options: Any) -> Case:  # fmt: skip
    return Case("seg_argmax", name, lambda: (normal(*shape, **options), size, align), bench)


SEG_ARGMAX = (
    _seg("cityscapes x8", (1, 19, 128, 256), (1024, 2048), bench=True),
    _seg("camvid x4", (8, 11, 90, 120), (360, 480), bench=True),
    _seg("cityscapes x8 channels_last", (1, 19, 128, 256), (1024, 2048), bench=True, layout="channels_last"),
    _seg("cityscapes x8 bfloat16", (1, 19, 128, 256), (1024, 2048), bench=True, dtype=torch.bfloat16),
    _seg("odd", (2, 5, 13, 17), (101, 131)),
    _seg("odd, corners", (2, 5, 13, 17), (101, 131), True),
    _seg("one pixel", (1, 3, 1, 1), (5, 7)),
    _seg("to one pixel", (2, 3, 5, 6), (1, 1), True),
    _seg("same size", (2, 4, 9, 10), (9, 10)),
    _seg("shrink", (2, 6, 64, 80), (9, 11)),
    _seg("shrink, corners", (2, 6, 64, 80), (9, 11), True),
    _seg("grow and shrink", (1, 4, 40, 9), (17, 200)),
    _seg("one class", (1, 1, 6, 6), (12, 12)),
    _seg("256 classes", (1, 256, 3, 5), (7, 140)),
    _seg("empty batch", (0, 3, 4, 5), (8, 10)),
    _seg("channels_last", (2, 19, 11, 12), (44, 50), layout="channels_last"),
    _seg("strided", (2, 5, 11, 12), (44, 50), layout="strided"),
    _seg("transposed", (2, 5, 11, 12), (30, 31), layout="transposed"),
    _seg("float16", (2, 7, 16, 16), (64, 64), dtype=torch.float16),
    _seg("float16 channels_last", (2, 7, 16, 16), (64, 63), dtype=torch.float16, layout="channels_last"),
    _seg("bfloat16", (2, 7, 16, 16), (64, 64), dtype=torch.bfloat16),
)


def similarity(channels: int, *, seed: int = 0, layout: str = "contiguous") -> Tensor:
    """|cosine| similarities of random rows: symmetric, in 0..1, diagonal 0."""
    rows = torch.nn.functional.normalize(normal(channels, max(4, channels // 8), seed=seed), dim=1)
    lower = (rows @ rows.T).abs().tril(-1)
    return arrange(lower + lower.T, layout)


def _greedy(name: str, *channels: int, bench: bool = False, layout: str = "contiguous") -> Case:
    return Case("greedy_order", name, lambda: ([similarity(c, seed=c, layout=layout) for c in channels],), bench)


GREEDY_ORDER = (
    _greedy("2048", 2048, bench=True),
    _greedy("deeplabv3_resnet50 groups", *DEEPLAB_GROUPS, bench=True),
    _greedy("one channel", 1),
    _greedy("several", 17, 1, 64, 33),
    _greedy("strided", 31, 16, layout="strided"),
    _greedy("transposed", 31, 16, layout="transposed"),
)


def _stats(name: str, *shape: int, padding: str = "replicate", bench: bool = False, **options: Any) -> Case:
    return Case("map_stats", name, lambda: (normal(*shape, **options), padding), bench)


MAP_STATS = (
    _stats("256 maps of 90x120", 8, 256, 90, 120, bench=True),
    _stats("64 maps of 180x240", 8, 64, 180, 240, bench=True),
    _stats("256 maps of 90x120 channels_last", 8, 256, 90, 120, bench=True, layout="channels_last"),
    _stats("256 maps of 90x120 bfloat16", 8, 256, 90, 120, bench=True, dtype=torch.bfloat16),
    _stats("odd", 2, 7, 13, 19),
    _stats("odd, zeros", 2, 7, 13, 19, padding="zeros"),
    _stats("one position", 3, 5, 1, 1),
    _stats("one position, zeros", 3, 5, 1, 1, padding="zeros"),
    _stats("one row", 1, 3, 1, 40),
    _stats("one column", 1, 3, 40, 1, padding="zeros"),
    _stats("empty batch", 0, 3, 4, 5),
    _stats("channels_last", 2, 37, 9, 11, layout="channels_last"),
    _stats("channels_last, zeros", 2, 37, 9, 11, layout="channels_last", padding="zeros"),
    _stats("strided", 2, 5, 8, 9, layout="strided"),
    _stats("transposed", 2, 5, 8, 9, layout="transposed"),
    _stats("float16", 2, 18, 16, 17, dtype=torch.float16),
    _stats("bfloat16 channels_last", 2, 18, 16, 17, dtype=torch.bfloat16, layout="channels_last"),
)

ALL: tuple[Case, ...] = GREEDY_ORDER + MAP_STATS + SEG_ARGMAX


def of(op: str) -> list[Case]:
    return [case for case in ALL if case.op == op]
