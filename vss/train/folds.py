"""Cross-validation of decisions: each image is judged by a network that was not trained on it, at a threshold that
others chose.

One validation split of a few defects says little of a limit on missed ones; the validation parts of N trainings,
together, are all images but those of the test split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vss.core.errors import VssError
from vss.train.metrics import Rule, at_threshold, average_precision, choose_threshold, draws, interval, resampled_ap


def out_of_fold(tables: Sequence[np.ndarray], *, rule: Rule = "f1", max_fnr_pct: float = 0.0) -> dict[str, Any]:
    """Figures over the validation images of all folds together.

    The threshold of a fold is chosen on the scores of all other folds, each by its own network: no image has a part in
    the threshold that judges it, as no image of production has. Average precision ranks the scores of all networks
    together, so both tell of networks whose scores have another scale.

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
