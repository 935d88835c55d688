"""What a page shows of one evaluation beside its scores: confusion, changes by class, the worst images, curves of
decisions, and what the folds of a cross-validation say together. Everything comes from the figures by image that a run
keeps; no network runs again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vss.core.errors import VssError
from vss.train.gate import image_draws
from vss.train.metrics import (
    Rule,
    at_threshold,
    average_precision,
    choose_threshold,
    draws,
    interval,
    miou_pct,
    pr_curve,
    resampled_ap,
)

POINTS = 400
"""Of a curve over thresholds, at most."""
BINS = 40
BLOCK = 64
"""Images whose matrices are held in float64 at once."""
LOWEST, LOST = "lowest score", "lost most"


def image_ious(confusion: np.ndarray) -> np.ndarray:
    """(n, K, K) counts -> (n,) mean IoU in percent of each image over the classes in its truth, NaN where all is void.

    For finding images; the score of a network is that of one matrix over the set.
    """
    parts = np.array_split(np.asarray(confusion), -(-len(confusion) // BLOCK))
    return np.concatenate([miou_pct(torch.from_numpy(part), truth=True).numpy() for part in parts])


def worst_images(before: np.ndarray, after: np.ndarray, amount: int) -> list[tuple[int, str]]:
    """Indices of the worst images and why: half have the lowest score `after`, the others lost most since `before`.

    Args:
        before, after: (n,) scores in percent, NaN for images that cannot be judged.
    """
    judged = [int(index) for index in np.argsort(after, kind="stable") if np.isfinite(after[index] + before[index])]
    change = after - before
    lost = [index for index in sorted(judged, key=lambda index: change[index]) if change[index] < 0]
    amount = min(amount, len(judged))
    chosen = dict.fromkeys(judged[: (amount + 1) // 2], LOWEST)
    for index in lost[:amount]:
        if len(chosen) < amount:
            chosen.setdefault(index, LOST)
    for index in judged:
        if len(chosen) < amount:
            chosen.setdefault(index, LOWEST)
    return list(chosen.items())


def listed_images(ids: Sequence[str], confusions: Mapping[str, np.ndarray], amount: int) -> list[dict[str, Any]]:
    """`vss.core.report.Worst` of the worst images; `confusions` are (n, K, K) by row, the first before, the last after.

    `confused` is what the last network gets wrong most: [true class, predicted class, percent of the image].
    """
    scores = {name: image_ious(images) for name, images in confusions.items()}
    first, last = next(iter(confusions)), list(confusions)[-1]
    rows = []
    for index, why in worst_images(scores[first], scores[last], amount):
        counts = np.asarray(confusions[last][index])
        wrong = counts - np.diag(counts.diagonal())
        true, guess = np.unravel_index(int(wrong.argmax()), wrong.shape)
        share = 100 * float(wrong[true, guess]) / max(1, int(counts.sum()))
        row: dict[str, Any] = {"id": ids[index], "why": why}
        row["scores"] = {name: float(values[index]) for name, values in scores.items()}
        rows.append(row | ({"confused": [int(true), int(guess), share]} if share else {}))
    return rows


def class_drop_intervals(before: np.ndarray, after: np.ndarray) -> list[list[float] | None]:
    """95 % bootstrap interval over images of the drop in IoU of every class, in points; None for a class that no image
    has.

    Args:
        before, after: (n, K, K) counts by image, rows are truth, the same images for both.
    """
    weights = image_draws(len(before)).astype(np.float64)
    drops = _resampled_iou(weights, before) - _resampled_iou(weights, after)
    present = np.asarray(before).sum((0, 2)) > 0
    return [interval(values) if there else None for values, there in zip(drops.T, present, strict=True)]


def _resampled_iou(weights: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """(samples, K) IoU in percent, NaN where a sample has the class in neither truth nor prediction."""
    hits = np.einsum("nkk->nk", confusion)
    tops, unions = weights @ hits, weights @ (confusion.sum(1) + confusion.sum(2) - hits)
    return 100 * np.divide(tops, unions, out=np.full_like(tops, np.nan), where=unions > 0)


def decision_curves(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """`vss.core.report.Decisions` of one network: precision and recall, misses and false alarms from every score on,
    and how many images have which score.

    Args:
        labels: (n,) true for a defect.
        scores: (n,) log-odds; from `threshold` on an image is called defective.
    """
    labels = np.asarray(labels).astype(bool)
    curve = pr_curve(labels, scores)
    kept = np.unique(np.linspace(0, len(curve.threshold) - 1, min(POINTS, len(curve.threshold))).round().astype(int))
    edges = np.histogram_bin_edges(scores, BINS)
    return {
        "threshold": float(threshold),
        "score": curve.threshold[kept].tolist(),
        "precision_pct": (100 * curve.precision[kept]).tolist(),
        "recall_pct": (100 * curve.recall[kept]).tolist(),
        "misses": (labels.sum() - curve.true_positives[kept]).astype(int).tolist(),
        "false_alarms": curve.false_positives[kept].astype(int).tolist(),
        "edges": edges.tolist(),
        "defective": np.histogram(scores[labels], edges)[0].tolist(),
        "sound": np.histogram(scores[~labels], edges)[0].tolist(),
    }


def out_of_fold(tables: Sequence[np.ndarray], *, rule: Rule = "f1", max_fnr_pct: float = 0.0) -> dict[str, Any]:
    """Figures over the validation images of all folds together: each is judged by a network that was not trained on it.

    One validation split of a few defects says little of a limit on missed ones; the validation parts of N trainings,
    together, are all images but those of the test split. The threshold of a fold is chosen on the scores of all other
    folds, each by its own network: no image has a part in the threshold that judges it, as no image of production has.
    Average precision ranks the scores of all networks together, so both tell of networks whose scores have another
    scale.

    Args:
        tables: of each fold (n, 2) float64: label, 1 for a defect, and score; both kinds in any N - 1 folds together.
        rule, max_fnr_pct: as for `choose_threshold`.

    Returns:
        Figures of `at_threshold`, `ap_pct`, `positives`, `negatives`; `threshold_logit` for other images, chosen on all
        scores; `thresholds`, of each fold; and arrays (n,) over all images: `labels` bool, `scores`, `called` bool.
    """
    if len(tables) < 2:
        raise VssError(f"{len(tables)} folds came; a threshold that others choose needs 2 or more.")
    thresholds = []
    for index in range(len(tables)):
        others = np.concatenate([table for place, table in enumerate(tables) if place != index])
        thresholds.append(choose_threshold(others[:, 0], others[:, 1], rule=rule, max_fnr_pct=max_fnr_pct))
    labels, scores = np.concatenate(tables).T
    labels = labels.astype(bool)
    margins = np.concatenate([table[:, 1] - limit for table, limit in zip(tables, thresholds, strict=True)])
    return {
        **at_threshold(labels, margins, 0.0),
        "ap_pct": average_precision(labels, scores),
        "positives": int(labels.sum()),
        "negatives": int((~labels).sum()),
        "threshold_logit": choose_threshold(labels, scores, rule=rule, max_fnr_pct=max_fnr_pct),
        "thresholds": thresholds,
        "labels": labels,
        "scores": scores,
        "called": margins >= 0,
    }


def drops(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[float]]:
    """95 % bootstrap intervals in points, over the same images for both: `ap_pct` of the drop in average precision,
    `fnr_pct` of the increase in the share of missed defects.

    Args:
        before, after: results of `out_of_fold` for the same folds.
    """
    labels = before["labels"]
    if not np.array_equal(labels, after["labels"]):
        raise VssError("the two networks were scored on other images; cross-validate both on the same folds.")
    weights = draws(labels)
    missed = (weights[:, labels] @ (~each["called"][labels]).astype(np.float64) for each in (after, before))
    lost = 100 * np.subtract(*missed) / labels.sum()
    precision = (resampled_ap(labels, each["scores"], weights) for each in (before, after))
    return {"ap_pct": interval(np.subtract(*precision)), "fnr_pct": interval(lost)}
