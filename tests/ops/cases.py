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


def on_cuda(value: Any) -> Any:
    """A copy on the device with the same strides, list by list; what is no tensor stays."""
    if isinstance(value, list | tuple):
        return type(value)(on_cuda(item) for item in value)
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    if value.numel() == 0:
        return value.cuda()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    storage = value.as_strided((extent,), (1,)).cuda()
    return storage.as_strided(value.shape, value.stride())


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


def _gram(name: str, *shape: int, norms: bool = True, means: bool = False, bench: bool = False,
          **options: Any) -> Case:  # fmt: skip
    def inputs() -> Args:
        x, channels = normal(*shape, **options), shape[1]
        divisors = x.float().abs().sum((2, 3)) + 1e-5 if norms else None
        return torch.eye(channels), x, divisors, normal(channels, seed=1) if means else None

    return Case("gram_accumulate", name, inputs, bench)


GRAM = (
    _gram("64 x 90x120", 8, 64, 90, 120, bench=True),
    _gram("256 x 45x60", 8, 256, 45, 60, bench=True),
    _gram("1024 x 45x60", 8, 1024, 45, 60, bench=True),
    _gram("1024 x 45x60 channels_last", 8, 1024, 45, 60, bench=True, layout="channels_last"),
    _gram("7 x 3x5", 2, 7, 3, 5),
    _gram("33 x 1x17", 2, 33, 1, 17),
    _gram("one position", 3, 40, 1, 1),
    _gram("one channel", 2, 1, 9, 9),
    _gram("no norms", 2, 34, 6, 7, norms=False),
    _gram("means", 2, 34, 20, 21, norms=False, means=True),
    _gram("both", 2, 65, 20, 21, means=True),
    _gram("empty batch", 0, 5, 3, 3),
    _gram("channels_last", 2, 37, 18, 19, layout="channels_last"),
    _gram("strided", 2, 37, 8, 9, layout="strided"),
    _gram("transposed", 2, 37, 8, 9, layout="transposed"),
    _gram("float16", 2, 37, 8, 9, dtype=torch.float16, norms=False),
    _gram("bfloat16 channels_last", 2, 37, 8, 9, dtype=torch.bfloat16, layout="channels_last"),
)


def deeplab_weights() -> list[tuple[int, ...]]:
    """Weight shapes of the 62 convolutions of deeplabv3_resnet50 (12 classes, auxiliary head)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(planes, width, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            shapes += [(4 * planes, width, 1, 1)] if block == 0 else []
            width = 4 * planes
    shapes += [(256, 2048, 1, 1), *[(256, 2048, 3, 3)] * 3, (256, 2048, 1, 1), (256, 1280, 1, 1), (256, 256, 3, 3)]
    return [*shapes, (12, 256, 1, 1), (256, 1024, 3, 3), (12, 256, 1, 1)]


def _reduce(name: str, mode: str, shapes: list[tuple[int, ...]], dims: list[int], *, bench: bool = False,
            **options: Any) -> Case:  # fmt: skip
    def inputs() -> Args:
        weights = [normal(*shape, seed=i, **options) for i, shape in enumerate(shapes)]
        grads = [normal(*shape, seed=100 + i, **options) for i, shape in enumerate(shapes)]
        return weights, grads if "product" in mode else [], dims, mode

    return Case("channel_reduce", name, inputs, bench)


_SMALL: list[tuple[int, ...]] = [(5, 3, 3, 3), (1, 7, 1, 1), (33, 17), (9,), (2, 4, 40, 41), (3, 2, 70, 80)]
_DEEPLAB = deeplab_weights()
CHANNEL_REDUCE = (
    _reduce("deeplabv3_resnet50 l1", "l1", _DEEPLAB, [0] * len(_DEEPLAB), bench=True),
    _reduce("deeplabv3_resnet50 l2", "l2", _DEEPLAB, [0] * len(_DEEPLAB), bench=True),
    _reduce("deeplabv3_resnet50 inputs l2", "l2", _DEEPLAB, [1] * len(_DEEPLAB), bench=True),
    _reduce("deeplabv3_resnet50 abs_product", "abs_product", _DEEPLAB, [0] * len(_DEEPLAB), bench=True),
    *(_reduce(f"small {mode}", mode, _SMALL, [0] * 6) for mode in ("l1", "l2", "product", "abs_product")),
    _reduce("inputs", "abs_product", _SMALL, [1, 1, 1, 0, 1, 1]),
    _reduce("long inputs", "l1", [(3, 5, 61, 83), (40, 5000)], [1, 1]),
    _reduce("last axis", "l2", [(6, 5, 4)], [2]),
    _reduce("channels_last", "product", [(6, 5, 3, 3), (4, 9, 2, 2)], [0, 1], layout="channels_last"),
    _reduce("strided", "l1", [(6, 5, 3, 3), (4, 9)], [1, 0], layout="strided"),
    _reduce("float16", "product", _SMALL, [0] * 6, dtype=torch.float16),
    _reduce("bfloat16 inputs", "l2", _SMALL[:3], [1] * 3, dtype=torch.bfloat16),
    _reduce("no elements", "l2", [(3, 0, 2), (4, 0), (2, 2)], [0, 0, 0]),
)


def _moments(name: str, *shape: int, mask: bool = False, bench: bool = False, **options: Any) -> Case:
    def inputs() -> Args:
        weights = normal(shape[0], *shape[2:], seed=2).abs() if mask else None
        return normal(*shape, **options), normal(*shape, seed=1, **options), weights

    return Case("channel_moments", name, inputs, bench)


CHANNEL_MOMENTS = (
    _moments("256 maps of 90x120", 8, 256, 90, 120, bench=True),
    _moments("256 maps of 90x120 masked", 8, 256, 90, 120, mask=True, bench=True),
    _moments("odd", 2, 7, 13, 19),
    _moments("odd, mask", 2, 7, 13, 19, mask=True),
    _moments("one position", 3, 5, 1, 1, mask=True),
    _moments("no position", 3, 5, 0, 4),
    _moments("empty batch", 0, 3, 4, 5),
    _moments("channels_last", 2, 37, 9, 11, mask=True, layout="channels_last"),
    _moments("strided", 2, 5, 8, 9, layout="strided"),
    _moments("transposed", 2, 5, 8, 9, mask=True, layout="transposed"),
    _moments("float16", 2, 18, 16, 17, dtype=torch.float16),
    _moments("bfloat16 channels_last", 2, 18, 16, 17, mask=True, dtype=torch.bfloat16, layout="channels_last"),
)


def _pool(name: str, *shape: int, kernel: int = 2, bench: bool = False, **options: Any) -> Case:
    return Case("max_pool_indices", name, lambda: (normal(*shape, **options), kernel), bench)


def _unpool(name: str, *shape: int, kernel: int = 2, bench: bool = False, **options: Any) -> Case:
    def inputs() -> Args:
        x = normal(*shape, **options)
        values, indices = torch.nn.functional.max_pool2d(x, kernel, return_indices=True)
        return arrange(values, options.get("layout", "contiguous")), indices.int(), shape[2:]

    return Case("max_unpool", name, inputs, bench)


_POOLED: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("segnet", (4, 64, 360, 480), {"bench": True}),
    ("odd", (2, 3, 13, 17), {}),
    ("kernel 3", (2, 3, 13, 17), {"kernel": 3}),
    ("kernel 1", (1, 2, 3, 4), {"kernel": 1}),
    ("one window", (1, 2, 2, 2), {}),
    ("empty batch", (0, 3, 4, 6), {}),
    ("channels_last", (2, 20, 8, 10), {"layout": "channels_last"}),
    ("strided", (2, 3, 8, 10), {"layout": "strided"}),
    ("float16", (2, 3, 8, 10), {"dtype": torch.float16}),
    ("bfloat16", (2, 3, 8, 10), {"dtype": torch.bfloat16}),
)
MAX_POOL = tuple(_pool(name, *shape, **options) for name, shape, options in _POOLED)
MAX_UNPOOL = tuple(_unpool(name, *shape, **options) for name, shape, options in _POOLED)

ALL: tuple[Case, ...] = (
    CHANNEL_MOMENTS + CHANNEL_REDUCE + GRAM + GREEDY_ORDER + MAP_STATS + MAX_POOL + MAX_UNPOOL + SEG_ARGMAX
)


def of(op: str) -> list[Case]:
    return [case for case in ALL if case.op == op]
