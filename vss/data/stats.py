"""How often each class occurs in a split, and loss weights from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vss.core.errors import unknown
from vss.data.contents import count_values
from vss.data.segdata import Pair, SegData

WEIGHT_MODES = ("median", "log", "none")
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Pixels of each class over a split.

    `pixels`: (K,) int64. `images`: (K,) int64, images that hold the class. `in_images`: (K,) int64, labelled pixels of
    those images. `ignored`: pixels that no class owns.
    """

    pixels: np.ndarray
    images: np.ndarray
    in_images: np.ndarray
    ignored: int

    @classmethod
    def of(cls, rows: np.ndarray, *, ignored: int) -> ClassCounts:
        """From (images, K) int64 pixel counts."""
        present = rows > 0
        labelled = rows.sum(axis=1, keepdims=True)
        return cls(
            pixels=rows.sum(axis=0),
            images=present.sum(axis=0),
            in_images=(present * labelled).sum(axis=0),
            ignored=ignored,
        )


def class_counts(data: SegData, pairs: Sequence[Pair]) -> np.ndarray:
    """(n, 256) int64: pixels of every class and of `ignore_index` in each mask at its own resolution.

    Masks are read once and remembered by their contents. Raises `VssError` for a bad mask.
    """
    rows = np.zeros((len(pairs), 256), np.int64)
    masks = [pair.mask for pair in pairs]
    for row, mask, (dtype, counts) in zip(rows, masks, count_values(masks), strict=True):
        stored = np.array([list(counts)], np.dtype(dtype))
        np.add.at(row, data.decoded(mask, stored)[0], list(counts.values()))
    return rows


def count_classes(data: SegData, split: str = "train") -> ClassCounts:
    """The pixels of every class over a split. Raises `VssError` for a bad mask."""
    rows = class_counts(data, data.pairs(split))
    return ClassCounts.of(rows[:, : data.num_classes], ignored=int(rows[:, data.ignore_index].sum()))


def class_frequencies(data: SegData, split: str = "train") -> np.ndarray:
    """(K,) float64: each class's share of the labelled pixels of a split, 0 for an absent class."""
    pixels = count_classes(data, split).pixels
    return pixels / max(1, pixels.sum())


def weights_from_counts(counts: ClassCounts, mode: str) -> np.ndarray:
    """(K,) float64 loss weights; an absent class, which no pixel can ask for, has weight 1.

    `median`: median frequency balancing (Eigen and Fergus, 2015, as in SegNet): median(f) / f(c), where f(c) is the
    share of c in the images that hold it. `log`: 1 / ln(1.02 + share of c) (Paszke et al., ENet, 2016). `none`: ones.
    """
    if mode not in WEIGHT_MODES:
        raise unknown("class weight mode", mode, WEIGHT_MODES)
    present = counts.pixels > 0
    weights = np.ones(len(counts.pixels))
    if mode == "median" and present.any():
        frequency = counts.pixels[present] / counts.in_images[present]
        weights[present] = np.median(frequency) / frequency
    elif mode == "log" and present.any():
        weights[present] = 1 / np.log(1.02 + counts.pixels[present] / counts.pixels.sum())
    return weights


def class_weights(data: SegData, split: str = "train", mode: str = "median") -> torch.Tensor:
    """(K,) float32 loss weights from the masks of a split; `mode` as in `weights_from_counts`."""
    if mode == "none":
        return torch.ones(data.num_classes)
    return torch.from_numpy(weights_from_counts(count_classes(data, split), mode)).float()
