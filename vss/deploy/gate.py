"""Did the smaller or faster thing keep its accuracy? A pure function of two evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vss.errors import VssError

ROUNDING = 1e-9  # so that 50.1 - 50.0 is a drop of 0.1


def gate(
    baseline: Mapping[str, Any],
    candidate: Mapping[str, Any],
    *,
    metric: str = "miou_pct",
    max_drop: float = 0.1,
    lower_is_better: bool = False,
) -> dict[str, Any]:
    """Compare two results of `vss.evaluate.evaluate`.

    Args:
        metric: a key of both, in percent.
        max_drop: by how many points `candidate` may be worse than `baseline`; negative asks for a gain.
        lower_is_better: of the metric, as of a rate of misses; worse is an increase then, and `drop` is that increase.

    Returns:
        {"passed", "metric", "baseline", "candidate", "drop", "max_drop", "sentence"}; for miou_pct, and when both hold
        `confusion_per_image`, also "drop_interval": [low, high], the 95 % bootstrap interval over images.

    Raises:
        VssError: the metric is missing or undefined, or the two were not measured on the same images and resolution.
    """
    if not math.isfinite(max_drop):
        raise VssError(f"max_drop is {max_drop}; expected a number of points.")
    before, after = (_value(name, each, metric) for name, each in (("baseline", baseline), ("candidate", candidate)))
    for key in ("images", "resolution"):
        if key in baseline and key in candidate and baseline[key] != candidate[key]:
            raise VssError(
                f"baseline and candidate differ in {key} ({baseline[key]} and {candidate[key]}); evaluate both alike."
            )
    drop = after - before if lower_is_better else before - after
    passed = drop <= max_drop + ROUNDING
    change = "an increase" if lower_is_better else "a drop"
    result = {
        "passed": passed,
        "metric": metric,
        "baseline": before,
        "candidate": after,
        "drop": drop,
        "max_drop": max_drop,
        "sentence": f"{'passed' if passed else 'failed'}: {metric} went from {before:.3f} to {after:.3f}, "
        f"{change} of {drop:.3f} points where {max_drop:g} {'is' if max_drop == 1 else 'are'} allowed.",
    }
    if metric == "miou_pct" and "confusion_per_image" in baseline and "confusion_per_image" in candidate:
        result["drop_interval"] = drop_interval(baseline["confusion_per_image"], candidate["confusion_per_image"])
    return result


def _value(name: str, result: Mapping[str, Any], metric: str) -> float:
    if metric not in result:
        raise VssError(f"the {name} has no {metric!r}; it has {', '.join(sorted(result)) or 'nothing'}.")
    value = result[metric]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise VssError(f"{metric} of the {name} is {value!r}; expected a number.")
    return float(value)


def drop_interval(
    baseline: np.ndarray, candidate: np.ndarray, *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> list[float]:
    """Bootstrap interval of the mIoU drop in points, resampling images, the same ones for both (Efron 1979).

    Args:
        baseline, candidate: (n, K, K) counts per image, rows are truth, same images in the same order.

    Returns:
        [low, high], percentile interval.
    """
    if baseline.shape != candidate.shape or not len(baseline):
        raise VssError(f"confusion per image {baseline.shape} and {candidate.shape} do not belong together.")
    count = len(baseline)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    drops = _resampled_miou(weights, baseline) - _resampled_miou(weights, candidate)
    edge = 100 * (1 - level) / 2
    low, high = np.nanpercentile(drops, [edge, 100 - edge])
    return [float(low), float(high)]


def _resampled_miou(weights: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """weights: (samples, n) counts. Returns (samples,) mIoU in percent."""
    from vss.metrics import miou_pct

    classes = confusion.shape[-1]
    sums = weights.astype(np.float64) @ confusion.reshape(len(confusion), -1).astype(np.float64)
    return miou_pct(torch.from_numpy(sums.reshape(-1, classes, classes))).numpy()
