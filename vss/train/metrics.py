"""Figures of label maps, from one confusion matrix over the whole split, and of decisions about whole images.

Per-image averages are never taken: papers sum intersections and unions over the set first. Scores are in percent and
computed in float64. A score that nothing defines (a class in neither truth nor prediction) is None, never NaN.
torchmetrics has the confusion matrix, average precision and AUROC as well: it costs seconds of import, has no matrix
per image and works in float32, so these are ours, equal to its in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vss.core.errors import VssError

BOUNDARY_RATIO = 0.02  # of the image diagonal; Cheng et al. 2021, section 5.1
Rule = Literal["f1", "fnr"]
Z95 = 1.959963984540054  # standard normal quantile of 0.975


def confusion_per_image(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """One confusion matrix per image.

    Args:
        pred: (N, H, W) integer labels in 0..K-1 (checked where the truth is not void).
        target: (N, H, W) integer labels in 0..K-1 or `ignore_index`.

    Returns:
        (N, K, K) int64 pixel counts, rows are truth, columns are prediction.

    Raises:
        VssError: shapes differ, or a counted label lies outside the classes.
    """
    if pred.shape != target.shape or pred.ndim != 3:
        raise VssError(f"prediction {tuple(pred.shape)} and truth {tuple(target.shape)} must both be (N, H, W).")
    valid = target != ignore_index
    count, kk = len(target), num_classes * num_classes
    truth, guess = target[valid].long(), pred[valid].long()
    _check_range("truth", truth, num_classes, f" or {ignore_index} (void)")
    _check_range("prediction", guess, num_classes, "")
    image = torch.arange(count, device=target.device).view(-1, 1, 1).expand_as(target)[valid]
    flat = image * kk + truth * num_classes + guess
    return torch.bincount(flat, minlength=count * kk).view(count, num_classes, num_classes)


def _check_range(kind: str, labels: Tensor, num_classes: int, more: str) -> None:
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        raise VssError(
            f"{kind} labels reach from {low} to {high}; expected 0..{num_classes - 1}{more}: "
            "check the class count and the mask decoding."
        )


def scores(confusion: Tensor, boundary: Tensor | None = None) -> dict[str, Any]:
    """Scores of one confusion matrix, in percent.

    Args:
        confusion: (K, K) integer counts, rows are truth.
        boundary: (2, K) sums of `boundary_counts`.

    Returns:
        `miou_pct`: mean IoU over the classes present in truth or prediction;
        `miou_truth_pct`: over the classes present in truth, so that networks are compared over the same classes;
        `iou_pct`: list of K, None for a class in neither;
        `pixel_acc_pct`: share of counted pixels that are right;
        `class_acc_pct`: mean recall over the classes present in truth;
        `fwiou_pct`: IoU weighted by the class's share of the truth (Long et al. 2015);
        `boundary_iou_pct` where `boundary` is given: mean over the classes that have one.
    """
    matrix = confusion.double()
    hits, truth = matrix.diagonal(), matrix.sum(1)
    iou = _ratio(hits, truth + matrix.sum(0) - hits)
    total = truth.sum()
    edges = {} if boundary is None else {"boundary_iou_pct": _number(_ratio(*boundary.double()).nanmean())}
    return {
        "miou_pct": _number(iou.nanmean()),
        "miou_truth_pct": _number(iou[truth > 0].nanmean()),
        "pixel_acc_pct": _number(_ratio(hits.sum(), total)),
        "class_acc_pct": _number(_ratio(hits, truth).nanmean()),
        "fwiou_pct": _number(_ratio((truth * iou.nan_to_num(0.0)).sum(), total)),
        "iou_pct": [_number(value) for value in iou],
        **edges,
    }


def miou_pct(confusion: Tensor, *, truth: bool = False) -> Tensor:
    """confusion: (..., K, K) counts. Returns (...) float64 mean IoU in percent, NaN where nothing was counted.

    `truth`: over the classes present in truth alone. A class that is only predicted counts 0 otherwise, from its first
    pixel on, and for the network that predicts it alone.
    """
    matrix = confusion.double()
    hits, true = matrix.diagonal(dim1=-2, dim2=-1), matrix.sum(-1)
    iou = _ratio(hits, true + matrix.sum(-2) - hits)
    return 100 * (torch.where(true > 0, iou, torch.nan) if truth else iou).nanmean(-1)


def boundary_width(height: int, width: int, ratio: float = BOUNDARY_RATIO) -> int:
    """Pixels of boundary on the inside of a mask: `ratio` of the image diagonal, at least 1."""
    return max(1, round(ratio * (height * height + width * width) ** 0.5))


def boundary_counts(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255, ratio: float = BOUNDARY_RATIO
) -> Tensor:
    """Per-class intersections and unions of mask boundaries (Cheng et al. 2021), summed over the images.

    The boundary of a class is its mask minus the mask eroded by a square of radius `boundary_width`; outside of the
    image counts as another class, as in the paper. All classes are eroded at once: a pixel survives where the window's
    smallest and largest label agree. Deviation, since the paper has no void: void pixels are not counted, and neither
    truth nor prediction is eroded by them.

    Args:
        pred, target: (N, H, W) integer labels; `target` may hold `ignore_index`.

    Returns:
        (2, K) int64: pixels in both boundaries, pixels in either.
    """
    width = boundary_width(pred.shape[-2], pred.shape[-1], ratio)
    void = target == ignore_index
    pred_edge, true_edge = (_boundary(labels, void, num_classes, width) for labels in (pred, target))
    same = pred_edge & true_edge & (pred == target)
    pred_count, true_count, both = (
        torch.bincount(labels[mask].long(), minlength=num_classes)
        for labels, mask in ((pred, pred_edge), (target, true_edge), (target, same))
    )
    return torch.stack([both, pred_count + true_count - both])


def _boundary(labels: Tensor, void: Tensor, num_classes: int, width: int) -> Tensor:
    """(N, H, W) bool: counted pixels with another class, or the outside, within `width` (Chebyshev distance)."""
    labels = labels.to(torch.int16)
    padding = (width,) * 4
    low = torch.nn.functional.pad(labels.masked_fill(void, num_classes), padding, value=-1)
    high = torch.nn.functional.pad(labels.masked_fill(void, -1), padding, value=-1)
    window = 2 * width + 1
    return ~void & (_window(low, window, torch.minimum) != _window(high, window, torch.maximum))


def _window(x: Tensor, window: int, reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Reduce over every window x window square, in log2(window) steps per axis: a max_pool with stride 1."""
    for axis in (-2, -1):
        have = 1
        while have < window:
            step = min(have, window - have)
            size = x.shape[axis] - step
            x = reduce(x.narrow(axis, 0, size), x.narrow(axis, step, size))
            have += step
    return x


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / bottom, torch.full_like(bottom, torch.nan))


def _number(value: Tensor) -> float | None:
    return None if torch.isnan(value) else 100 * float(value)


# -- decisions about images: a label is True for a defect, which is called from a threshold on -------------------------


class Curve(NamedTuple):
    """The precision-recall curve: (T,) float64 each, thresholds falling, one for every distinct score."""

    threshold: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray


def check_scores(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool and (n,) float64, both kinds of label among them; raises `VssError` otherwise."""
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise VssError(f"labels {labels.shape} and scores {scores.shape} came; expected one score for every label.")
    if not np.isfinite(scores).all():
        raise VssError("a score is NaN or infinite; check the network's weights and its input.")
    if labels.all() or not labels.any():
        what = "a defect" if len(labels) and labels.all() else "no defect"
        raise VssError(
            f"every one of {len(labels)} images shows {what}; decisions are scored on images of both kinds: add some."
        )
    return labels, scores


def pr_curve(labels: np.ndarray, scores: np.ndarray) -> Curve:
    """The curve over all distinct scores; images of one score enter together."""
    labels, scores = check_scores(labels, scores)
    order = np.argsort(-scores, kind="stable")
    ends = _ends(scores[order])
    hits = np.cumsum(labels[order], dtype=np.float64)[ends]
    called = ends + 1.0
    return Curve(scores[order][ends], hits / called, hits / labels.sum(), hits, called - hits)


def _ends(falling: np.ndarray) -> np.ndarray:
    """Index of the last element of every run of equal values."""
    return np.flatnonzero(np.append(falling[1:] != falling[:-1], True))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Sum of precision times the step of recall, in percent; no interpolation, no trapezoids."""
    curve = pr_curve(labels, scores)
    return 100 * float((np.diff(curve.recall, prepend=0.0) * curve.precision).sum())


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Chance in percent that a defective image scores above a sound one, ties half (Mann and Whitney 1947)."""
    labels, scores = check_scores(labels, scores)
    sound, defective = np.sort(scores[~labels]), scores[labels]
    below = np.searchsorted(sound, defective, "left") + np.searchsorted(sound, defective, "right")
    return 100 * float(below.sum()) / (2 * len(sound) * len(defective))


def choose_threshold(labels: np.ndarray, scores: np.ndarray, *, rule: Rule = "f1", max_fnr_pct: float = 0.0) -> float:
    """A threshold for other images: half-way from the last score that is called defective to the next one below.

    Args:
        labels, scores: of the validation images.
        rule: "f1" for the best F1, the lowest such threshold, since it misses least; "fnr" for the highest threshold
            that misses at most `max_fnr_pct` percent of the defects.
    """
    curve = pr_curve(labels, scores)
    if rule == "f1":
        f1 = 2 * curve.precision * curve.recall / np.maximum(curve.precision + curve.recall, 1e-300)
        index = int(np.flatnonzero(f1 >= f1.max() - 1e-12)[-1])
    else:
        index = int(np.flatnonzero(100 * (1 - curve.recall) <= max_fnr_pct + 1e-9)[0])
    last = float(curve.threshold[index])
    return last if index + 1 == len(curve.threshold) else (last + float(curve.threshold[index + 1])) / 2


def at_threshold(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """Counts and rates where images from `threshold` on are called defective.

    Returns `tp`, `fp`, `fn`, `tn`, `recall_pct`, `fnr_pct` = 100 - recall, `precision_pct` (None where nothing was
    called), `f1_pct`, and the 95 % intervals `fnr_interval_pct` and `recall_interval_pct`.
    """
    labels, scores = check_scores(labels, scores)
    called = scores >= threshold
    tp, fp = int((called & labels).sum()), int((called & ~labels).sum())
    fn, tn = int((~called & labels).sum()), int((~called & ~labels).sum())
    low, high = wilson(fn, fn + tp)
    return {
        "tp": tp, "fp": fp, "fn": fn, "tn": tn,
        "recall_pct": 100 * tp / (tp + fn),
        "fnr_pct": 100 * fn / (tp + fn),
        "precision_pct": 100 * tp / (tp + fp) if tp + fp else None,
        "f1_pct": 200 * tp / (2 * tp + fp + fn),
        "fnr_interval_pct": [low, high],
        "recall_interval_pct": [100 - high, 100 - low],
    }  # fmt: skip


def fp_at_zero_fn(labels: np.ndarray, scores: np.ndarray) -> int:
    """Sound images called defective by the highest threshold that misses no defect of these very images."""
    labels, scores = check_scores(labels, scores)
    return int((scores[~labels] >= scores[labels].min()).sum())


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a rate in percent (Wilson 1927); of 0 in `total` it is not empty, as a bootstrap's would be.

    Ours, since importing scipy.stats takes a second; equal to its `binomtest` in the tests.
    """
    share, square = count / total, Z95**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z95 / (1 + square / total) * (share * (1 - share) / total + square / (4 * total**2)) ** 0.5
    low, high = (100 * (centre + side * half) for side in (-1, 1))
    return 0.0 if count == 0 else low, 100.0 if count == total else high


def draws(labels: np.ndarray, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """(samples, n) float64: how often each image is in a bootstrap sample (Efron 1979).

    Defective and sound images are drawn apart, so that every sample has as many of each as the split.
    """
    labels = np.asarray(labels).astype(bool)
    rng, found = np.random.default_rng(seed), np.zeros((samples, len(labels)))
    for kind in (True, False):
        where = np.flatnonzero(labels == kind)
        found[:, where] = rng.multinomial(len(where), np.full(len(where), 1 / len(where)), size=samples)
    return found


def resampled_ap(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision in percent of every bootstrap sample; weights: (samples, n) counts. Returns (samples,)."""
    labels, scores = check_scores(labels, scores)
    order = np.argsort(-scores, kind="stable")
    ends = _ends(scores[order])
    every = weights[:, order].cumsum(axis=1)[:, ends]
    hits = (weights[:, order] * labels[order]).cumsum(axis=1)[:, ends]
    precision = np.divide(hits, every, out=np.zeros_like(hits), where=every > 0)
    return 100 * (np.diff(hits, prepend=0.0, axis=1) * precision).sum(axis=1) / hits[:, -1]


def resampled_auroc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC in percent of every bootstrap sample. Returns (samples,)."""
    labels, scores = check_scores(labels, scores)
    better = (scores[labels][:, None] > scores[~labels]) + 0.5 * (scores[labels][:, None] == scores[~labels])
    defective, sound = weights[:, labels], weights[:, ~labels]
    return 100 * ((defective @ better) * sound).sum(axis=1) / (defective.sum(axis=1) * sound.sum(axis=1))


def resampled_f1(labels: np.ndarray, called: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 in percent of every bootstrap sample, at one threshold; called: (n,) bool. Returns (samples,)."""
    labels = np.asarray(labels).astype(bool)
    hits = weights @ (labels & called).astype(np.float64)
    return 200 * hits / (weights @ labels.astype(np.float64) + weights @ called.astype(np.float64))


def interval(values: np.ndarray) -> list[float]:
    """[low, high] that hold 95 % of the bootstrap samples in which the figure is defined (not NaN)."""
    edge = 100 * (1 - 0.95) / 2
    low, high = np.nanpercentile(values, [edge, 100 - edge])
    return [float(low), float(high)]


def decision_scores(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """All figures of one split at a threshold that was chosen elsewhere, with 95 % intervals.

    Beside those of `at_threshold`: `ap_pct`, `auroc_pct`, `fp_at_zero_fn`, `positives`, `negatives`, and by stratified
    bootstrap over images `ap_interval_pct`, `auroc_interval_pct`, `f1_interval_pct`.
    """
    labels, scores = check_scores(labels, scores)
    weights = draws(labels)
    bootstraps: dict[str, Callable[[], np.ndarray]] = {
        "ap": lambda: resampled_ap(labels, scores, weights),
        "auroc": lambda: resampled_auroc(labels, scores, weights),
        "f1": lambda: resampled_f1(labels, scores >= threshold, weights),
    }
    return {
        "ap_pct": average_precision(labels, scores),
        "auroc_pct": auroc(labels, scores),
        **at_threshold(labels, scores, threshold),
        "fp_at_zero_fn": fp_at_zero_fn(labels, scores),
        "positives": int(labels.sum()),
        "negatives": int((~labels).sum()),
        **{f"{name}_interval_pct": interval(make()) for name, make in bootstraps.items()},
    }


MAP_LIMIT, MAP_BINS = 16.0, 3200


class MapScores:
    """Average precision of the pixels of defect maps, from a histogram: logits in steps of 0.01 up to 16 either way.

    Pixels of one step enter together, so the figure is that of logits rounded to the step.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, MAP_BINS + 1, dtype=torch.int64)

    def update(self, logits: Tensor, truth: Tensor) -> None:
        """logits: float, truth: bool, of one shape."""
        bins = ((logits.double().clamp(-MAP_LIMIT, MAP_LIMIT) + MAP_LIMIT) * (MAP_BINS / (2 * MAP_LIMIT))).round()
        flat = truth.long().flatten() * (MAP_BINS + 1) + bins.long().flatten()
        self.counts += torch.bincount(flat, minlength=2 * (MAP_BINS + 1)).view_as(self.counts)

    def compute(self) -> float | None:
        """In percent; None where no pixel is a defect."""
        sound, defective = self.counts.double().flip(1).cumsum(1).unbind()
        if not defective[-1]:
            return None
        precision = defective / (defective + sound).clamp(min=1)
        return 100 * float((torch.diff(defective, prepend=defective.new_zeros(1)) * precision).sum() / defective[-1])
