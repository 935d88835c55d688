"""How often each class occurs in a split, and loss weights from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vss.data.images import thread_map
from vss.data.segdata import SegData
from vss.errors import unknown

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


def count_classes(
    data: SegData, split: str = "train", *, workers: int | None = None, progress: Progress | None = None
) -> ClassCounts:
    """Count the pixels of every mask of a split at its own resolution. Raises `VssError` for a bad mask."""
    pairs = data.pairs(split)

    def histogram(path: Path) -> np.ndarray:
        return np.bincount(data.read_mask(path).ravel(), minlength=256)

    rows = np.zeros((len(pairs), data.num_classes), np.int64)
    ignored = 0
    for done, counts in enumerate(thread_map(histogram, [pair.mask for pair in pairs], workers), start=1):
        rows[done - 1] = counts[: data.num_classes]
        ignored += int(counts[data.ignore_index])
        if progress is not None:
            progress(done, len(pairs))
    return ClassCounts.of(rows, ignored=ignored)


def class_frequencies(data: SegData, split: str = "train", *, workers: int | None = None) -> np.ndarray:
    """(K,) float64: each class's share of the labelled pixels of a split, 0 for an absent class."""
    pixels = count_classes(data, split, workers=workers).pixels
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
