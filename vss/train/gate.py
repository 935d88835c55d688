"""Did the smaller or faster thing keep its accuracy? A pure function of two evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from vss.core.errors import VssError
from vss.train.metrics import interval as interval_of
from vss.train.metrics import miou_pct

ROUNDING = 1e-9  # so that 50.1 - 50.0 is a drop of 0.1
IMAGES = "confusion_per_image"


def gate(
    baseline: Mapping[str, Any],
    candidate: Mapping[str, Any],
    *,
    metric: str = "miou_pct",
    max_drop: float | None = 0.1,
    lower_is_better: bool = False,
    interval: list[float] | None = None,
) -> dict[str, Any]:
    """Compare two results of `vss.train.evaluate.evaluate`.

    Mean IoU is compared over the classes in the truth of the split, the same for both: as the field defines it, a class
    that is only predicted counts 0, and one wrong pixel of it costs its network more than a tenth of the image.

    Args:
        metric: a key of both, in percent.
        max_drop: by how many points `candidate` may be worse than `baseline`; negative asks for a gain; None judges
            nothing and says so.
        lower_is_better: of the metric, as of a rate of misses; worse is an increase then, and `drop` is that increase.
        interval: 95 % interval of the drop, where the caller knows it.

    Returns:
        {"passed" (None where nothing was judged), "metric", "baseline", "candidate", "drop", "max_drop", "sentence"};
        "drop_interval": [low, high], as given, or for miou_pct the paired 95 % bootstrap interval over images when both
        hold `confusion_per_image`; and where the field's mean IoU differs from what was compared, "all_classes": the
        same figures of it.

    Raises:
        VssError: the metric is missing or undefined, or the two were not measured on the same images and resolution.
    """
    if max_drop is not None and not math.isfinite(max_drop):
        raise VssError(f"max_drop is {max_drop}; expected a number of points.")
    plain = _value("baseline", baseline, metric), _value("candidate", candidate, metric)
    for key in ("images", "resolution"):
        if key in baseline and key in candidate and baseline[key] != candidate[key]:
            raise VssError(
                f"baseline and candidate differ in {key} ({baseline[key]} and {candidate[key]}); evaluate both alike."
            )
    paired = metric == "miou_pct" and IMAGES in baseline and IMAGES in candidate
    if paired:
        interval = drop_interval(baseline[IMAGES], candidate[IMAGES])
    before, after = comparable(baseline, metric), comparable(candidate, metric)
    drop = after - before if lower_is_better else before - after
    passed = None if max_drop is None else drop <= max_drop + ROUNDING
    result: dict[str, Any] = {
        "passed": passed,
        "metric": metric,
        "baseline": before,
        "candidate": after,
        "drop": drop,
        "max_drop": max_drop,
    }
    if interval is not None:
        result["drop_interval"] = interval
    if max(abs(plain[0] - before), abs(plain[1] - after)) > ROUNDING:
        result["all_classes"] = {"baseline": plain[0], "candidate": plain[1], "drop": plain[0] - plain[1]}
        if paired:
            result["all_classes"]["drop_interval"] = drop_interval(baseline[IMAGES], candidate[IMAGES], truth=False)
    return result | {"sentence": _sentence(result, lower_is_better)}


def _sentence(found: Mapping[str, Any], lower_is_better: bool) -> str:
    passed, limit, metric = found["passed"], found["max_drop"], found["metric"]
    verdict = "not judged" if passed is None else "passed" if passed else "failed"
    allowed = f"where {limit:g} {'is' if limit == 1 else 'are'} allowed" if limit is not None else "and no limit is set"
    change = "an increase" if lower_is_better else "a drop"
    text = f"{verdict}: {metric} {_change(found, change)} {allowed}."
    if "all_classes" in found:
        text += (
            f" That is over the classes in the truth; with those that are only predicted counted as 0, {metric} "
            f"{_change(found['all_classes'], change)}."
        )
    return text


def _change(found: Mapping[str, Any], change: str) -> str:
    span = ""
    if "drop_interval" in found:
        span = " (95 % interval {:.3f} to {:.3f})".format(*found["drop_interval"])
    return (
        f"went from {found['baseline']:.3f} to {found['candidate']:.3f}, {change} of {found['drop']:.3f} points{span}"
    )


def _value(name: str, result: Mapping[str, Any], metric: str) -> float:
    if metric not in result:
        raise VssError(f"the {name} has no {metric!r}; it has {', '.join(sorted(result)) or 'nothing'}.")
    value = result[metric]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise VssError(f"{metric} of the {name} is {value!r}; expected a number.")
    return float(value)


def comparable(result: Mapping[str, object], metric: str) -> float:
    """The figure by which a network is compared with another one: mean IoU over the classes in the truth."""
    if metric == "miou_pct" and IMAGES in result:
        return float(miou_pct(torch.from_numpy(np.asarray(result[IMAGES]).sum(0)), truth=True))
    key = "miou_truth_pct" if metric == "miou_pct" and "miou_truth_pct" in result else metric
    return _value("network", result, key)


def drop_interval(
    baseline: np.ndarray, candidate: np.ndarray, *, samples: int = 1000, truth: bool = True
) -> list[float]:
    """Bootstrap interval of the mIoU drop in points, resampling images, the same ones for both (Efron 1979).

    Args:
        baseline, candidate: (n, K, K) counts per image, rows are truth, same images in the same order.
        truth: over the classes in the truth of what was drawn; else over those in truth or prediction.

    Returns:
        [low, high], percentile interval.

    Raises:
        VssError: other shapes, or another truth.
    """
    if baseline.shape != candidate.shape or not len(baseline):
        raise VssError(f"confusion per image {baseline.shape} and {candidate.shape} do not belong together.")
    if not np.array_equal(baseline.sum(-1), candidate.sum(-1)):
        raise VssError("the two networks were scored against different masks; evaluate both on the same data.")
    weights = image_draws(len(baseline), samples=samples)
    return interval_of(_resampled_miou(weights, baseline, truth) - _resampled_miou(weights, candidate, truth))


def miou_interval(confusion: np.ndarray, *, samples: int = 1000, seed: int = 0) -> list[float]:
    """confusion: (n, K, K) counts per image. Percentile bootstrap over images, in percent."""
    return interval_of(_resampled_miou(image_draws(len(confusion), samples=samples, seed=seed), confusion, False))


def image_draws(count: int, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """(samples, count) int64: how often each image is in a bootstrap sample."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)


def _resampled_miou(weights: np.ndarray, confusion: np.ndarray, truth: bool) -> np.ndarray:
    """weights: (samples, n) counts. Returns (samples,) mIoU in percent."""
    classes = confusion.shape[-1]
    sums = weights.astype(np.float64) @ confusion.reshape(len(confusion), -1).astype(np.float64)
    return miou_pct(torch.from_numpy(sums.reshape(-1, classes, classes)), truth=truth).numpy()
