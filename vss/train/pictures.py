"""Qualitative pictures: an image, its truth and what several predictors make of it, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.nn import functional as F

from vss.core.files import atomic, safe_name, sha256_json
from vss.data import IGNORE, SegSplit
from vss.train.evaluate import Predictor


def spread(items: Sized, amount: int) -> list[int]:
    """`amount` indices evenly over a collection; all of them where it has fewer."""
    amount = min(amount, len(items))
    return [index * len(items) // amount for index in range(amount)]


def file_name(name: str) -> str:
    """An image's id as part of a file name; two ids never share one.

    >>> file_name("a_b"), file_name("a/b"), file_name("a b")
    ('a_b', 'a_b-f5effa31', 'a_b-5e229e24')
    """
    safe = safe_name(name)
    return safe if safe == name else f"{safe}-{sha256_json(name)[:8]}"


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
        sample, name = split[index], file_name(split.ids[index])
        pictures = {"image": sample["image"].permute(1, 2, 0).numpy(), "truth": paint(sample["mask"].numpy(), palette)}
        for title, predict in predictors.items():
            pictures[title] = paint(predict(sample["image"][None])[0].cpu().numpy(), palette)
        files = {title: f"panels/{name}-{safe_name(title)}.png" for title in pictures}
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


def write_defects(
    root: Path, split: SegSplit, images: Iterable[Mapping[str, Any]], predict: Predictor, *, threshold: float
) -> list[dict[str, Any]]:
    """Write `defects/ID-WHAT.png` below `root`: image, mask and heat map of every image; returns the list of a report.

    Args:
        split: where the images come from.
        images: `id` and `score`, a probability.
        predict: gives the heads of a defect network.
        threshold: a probability; images below it are missed.
    """
    panels = []
    for row in images:
        sample = split[split.ids.index(row["id"])]
        pixels = sample["image"].permute(1, 2, 0).numpy()
        seg = predict(sample["image"][None])["seg"].float().cpu()
        logits = F.interpolate(seg, size=pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0]
        pictures = {"image": pixels, "mask": paint(sample["mask"].numpy(), MASK), "heat": heat(pixels, logits.numpy())}
        files = {title: f"defects/{file_name(row['id'])}-{title}.png" for title in pictures}
        for title, picture in pictures.items():
            with atomic(root / files[title]) as temporary:
                Image.fromarray(picture).save(temporary)
        panels.append({"id": row["id"], "files": files, "score": row["score"], "missed": row["score"] < threshold})
    return panels


MASK = np.array([(0, 0, 0), (255, 255, 255)], np.uint8)
HEAT = np.array([(0, 0, 60), (70, 30, 130), (200, 40, 90), (250, 150, 30), (255, 250, 150)], np.float64)


def heat(image: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: a map's probabilities as colours over the dimmed image, from dark blue (0) to yellow (1)."""
    share = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -50, 50)))
    steps = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, steps, HEAT[:, channel]) for channel in range(3)], axis=2)
    return (0.35 * image + 0.65 * colours).astype(np.uint8)
