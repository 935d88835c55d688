"""Segmentation metrics from one confusion matrix over the whole split, and boundary IoU beside them.

Per-image averages are never taken: papers sum intersections and unions over the set first. Scores are in percent.
A score that nothing defines (a class in neither truth nor prediction, a split of void only) is None, never NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from vss.core.errors import VssError

BOUNDARY_RATIO = 0.02  # of the image diagonal; Cheng et al. 2021, section 5.1


class SegMetrics(Metric):
    """Accumulates over a split; sum-reduced over processes by torchmetrics.

    Args:
        num_classes: K, labels are 0..K-1.
        ignore_index: truth value of pixels that are not counted.
        boundary: also accumulate boundary IoU (Cheng et al. 2021, https://arxiv.org/abs/2103.16562).

    Attributes:
        confusion: (K, K) int64 pixel counts, rows are truth, columns are prediction.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: Tensor
    boundary_intersection: Tensor
    boundary_union: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, boundary: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.ignore_index, self.boundary = num_classes, ignore_index, boundary
        zeros = torch.zeros(num_classes, dtype=torch.int64)
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        if boundary:
            self.add_state("boundary_intersection", zeros.clone(), dist_reduce_fx="sum")
            self.add_state("boundary_union", zeros.clone(), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """pred: (N, H, W) integer in 0..K-1; target: (N, H, W) integer in 0..K-1 or `ignore_index`."""
        self.confusion += confusion_per_image(pred, target, self.num_classes, self.ignore_index).sum(0)
        if self.boundary:
            intersection, union = boundary_counts(pred, target, self.num_classes, self.ignore_index)
            self.boundary_intersection += intersection
            self.boundary_union += union

    def compute(self) -> dict[str, Any]:
        """The scores of `scores`, and `boundary_iou_pct` (mean over classes with a boundary) when asked for."""
        result = scores(self.confusion)
        if self.boundary:
            iou = _ratio(self.boundary_intersection.double(), self.boundary_union.double())
            result["boundary_iou_pct"] = _number(_mean(iou))
        return result


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


def scores(confusion: Tensor) -> dict[str, Any]:
    """Scores of one confusion matrix, in percent, computed in float64.

    Args:
        confusion: (K, K) integer counts, rows are truth.

    Returns:
        `miou_pct`: mean IoU over the classes present in truth or prediction;
        `miou_truth_pct`: over the classes present in truth, so that networks are compared over the same classes;
        `iou_pct`: list of K, None for a class in neither;
        `pixel_acc_pct`: share of counted pixels that are right;
        `class_acc_pct`: mean recall over the classes present in truth;
        `fwiou_pct`: IoU weighted by the class's share of the truth (Long et al. 2015).
    """
    matrix = confusion.double()
    hits, truth = matrix.diagonal(), matrix.sum(1)
    iou = _ratio(hits, truth + matrix.sum(0) - hits)
    total = truth.sum()
    return {
        "miou_pct": _number(_mean(iou)),
        "miou_truth_pct": _number(_mean(iou[truth > 0])),
        "pixel_acc_pct": _number(_ratio(hits.sum(), total)),
        "class_acc_pct": _number(_mean(_ratio(hits, truth))),
        "fwiou_pct": _number(_ratio((truth * iou.nan_to_num(0.0)).sum(), total)),
        "iou_pct": [_number(value) for value in iou],
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
) -> tuple[Tensor, Tensor]:
    """Per-class intersections and unions of mask boundaries (Cheng et al. 2021), summed over the images.

    The boundary of a class is its mask minus the mask eroded by a square of radius `boundary_width`; outside of the
    image counts as another class, as in the paper. All classes are eroded at once: a pixel survives where the window's
    smallest and largest label agree. Deviation, since the paper has no void: void pixels are not counted, and neither
    truth nor prediction is eroded by them.

    Args:
        pred, target: (N, H, W) integer labels; `target` may hold `ignore_index`.

    Returns:
        Two (K,) int64 tensors: pixels in both boundaries, pixels in either.
    """
    width = boundary_width(pred.shape[-2], pred.shape[-1], ratio)
    void = target == ignore_index
    pred_edge, true_edge = (_boundary(labels, void, num_classes, width) for labels in (pred, target))
    same = pred_edge & true_edge & (pred == target)
    pred_count, true_count, both = (
        torch.bincount(labels[mask].long(), minlength=num_classes)
        for labels, mask in ((pred, pred_edge), (target, true_edge), (target, same))
    )
    return both, pred_count + true_count - both


def _boundary(labels: Tensor, void: Tensor, num_classes: int, width: int) -> Tensor:
    """(N, H, W) bool: counted pixels with another class, or the outside, within `width` (Chebyshev distance)."""
    labels = labels.to(torch.int16)
    padding = (width,) * 4
    low = torch.nn.functional.pad(labels.masked_fill(void, num_classes), padding, value=-1)
    high = torch.nn.functional.pad(labels.masked_fill(void, -1), padding, value=-1)
    window = 2 * width + 1
    return ~void & (_window(low, window, torch.minimum) != _window(high, window, torch.maximum))


def _window(x: Tensor, window: int, reduce: Any) -> Tensor:
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


def _mean(values: Tensor) -> Tensor:
    return values.nanmean()


def _number(value: Tensor) -> float | None:
    return None if torch.isnan(value) else 100 * float(value)
