"""Qualitative pictures: an image, its truth and what several predictors make of it, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vss.data import IGNORE, SegSplit
from vss.evaluate import Predictor
from vss.files import atomic


def spread(items: Sized, amount: int) -> list[int]:
    """`amount` indices evenly over a collection; all of them where it has fewer."""
    amount = min(amount, len(items))
    return [index * len(items) // amount for index in range(amount)]


def write_panels(
    root: Path, split: SegSplit, indices: Iterable[int], predictors: Mapping[str, Predictor], palette: np.ndarray
) -> list[dict[str, Any]]:
    """Write `panels/ID-WHAT.png` below `root` for every chosen image; returns the panel list of a report.

    Args:
        split: where the images come from.
        indices: which of them.
        predictors: name -> predictor; each becomes a picture beside `image` and `truth`.
        palette: (K, 3) uint8.
    """
    panels = []
    for index in indices:
        sample, name = split[index], split.ids[index].replace("/", "_")
        pictures = {"image": sample["image"].permute(1, 2, 0).numpy(), "truth": paint(sample["mask"].numpy(), palette)}
        for title, predict in predictors.items():
            pictures[title] = paint(predict(sample["image"][None])[0].cpu().numpy(), palette)
        files = {title: f"panels/{name}-{title}.png" for title in pictures}
        for title, pixels in pictures.items():
            with atomic(root / files[title]) as temporary:
                Image.fromarray(pixels).save(temporary)
        panels.append({"id": split.ids[index], "files": files})
    return panels


def paint(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) labels -> (H, W, 3) uint8; void is black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 0
    return table[labels]
