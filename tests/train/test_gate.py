"""vss.train.gate: a pure function, checked against hand-made numbers and a plain bootstrap loop."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from vss.core.errors import VssError
from vss.train.gate import drop_interval, gate
from vss.train.metrics import confusion_per_image, scores


@pytest.mark.parametrize(
    ("before", "after", "max_drop", "passed"),
    [
        (50.0, 49.95, 0.1, True),
        (50.1, 50.0, 0.1, True),  # 0.10000000000000142 in binary
        (50.0, 49.89, 0.1, False),
        (50.0, 51.0, 0.0, True),
        (50.0, 50.4, -0.5, False),
        (50.0, 50.6, -0.5, True),
    ],
)
def test_passes_up_to_max_drop(before: float, after: float, max_drop: float, passed: bool) -> None:
    result = gate({"miou_pct": before}, {"miou_pct": after}, max_drop=max_drop)
    assert result["passed"] is passed
    assert result["drop"] == pytest.approx(before - after)
    assert result["sentence"].startswith("passed" if passed else "failed")
    assert json.loads(json.dumps(result)) == result


def test_sentence_and_another_metric() -> None:
    result = gate({"pixel_acc_pct": 90.0}, {"pixel_acc_pct": 88.5}, metric="pixel_acc_pct", max_drop=1)
    assert result["sentence"] == (
        "failed: pixel_acc_pct went from 90.000 to 88.500, a drop of 1.500 points where 1 is allowed."
    )


@pytest.mark.parametrize(
    ("baseline", "candidate", "words"),
    [
        ({"miou": 1.0}, {"miou_pct": 1.0}, "the baseline has no 'miou_pct'; it has miou"),
        ({"miou_pct": 1.0}, {}, "the candidate has no 'miou_pct'; it has nothing"),
        ({"miou_pct": None}, {"miou_pct": 1.0}, "miou_pct of the baseline is None"),
        ({"miou_pct": 1.0}, {"miou_pct": math.nan}, "miou_pct of the candidate is nan"),
        ({"miou_pct": 1.0, "images": 3}, {"miou_pct": 1.0, "images": 4}, r"differ in images \(3 and 4\)"),
        (
            {"miou_pct": 1.0, "resolution": [3, 4]},
            {"miou_pct": 1.0, "resolution": [4, 3]},
            "differ in resolution",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(baseline: dict, candidate: dict, words: str) -> None:
    with pytest.raises(VssError, match=words):
        gate(baseline, candidate)


def test_max_drop_must_be_a_number() -> None:
    with pytest.raises(VssError, match="max_drop is nan"):
        gate({"miou_pct": 1.0}, {"miou_pct": 1.0}, max_drop=math.nan)


def confusions(seed: int, errors: float) -> np.ndarray:
    """20 images of one truth for every `errors`, which leave the diagonal."""
    rng = np.random.default_rng(seed)
    counts = np.stack([np.diag(row) for row in rng.integers(150, 200, (20, 3))])
    wrong = rng.poisson(errors, (20, 3, 3)) * (1 - np.eye(3, dtype=np.int64))
    return counts + wrong - np.stack([np.diag(row) for row in wrong.sum(2)])


def plain_miou(matrix: np.ndarray) -> float:
    values = []
    for k in range(len(matrix)):
        union = matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]
        if union:
            values.append(100 * matrix[k, k] / union)
    return float(np.mean(values))


def test_interval_equals_a_plain_loop_and_is_paired() -> None:
    baseline, candidate = confusions(0, 2.0), confusions(0, 8.0)
    rng = np.random.default_rng(0)
    drops = []
    for weights in rng.multinomial(20, np.full(20, 1 / 20), size=200):
        pick = np.repeat(np.arange(20), weights)
        drops.append(plain_miou(baseline[pick].sum(0)) - plain_miou(candidate[pick].sum(0)))
    assert drop_interval(baseline, candidate, samples=200) == pytest.approx(
        np.percentile(drops, [2.5, 97.5]).tolist(), abs=1e-9
    )
    assert drop_interval(baseline, baseline) == [0.0, 0.0]


def test_gate_adds_the_interval_around_the_drop() -> None:
    baseline, candidate = confusions(1, 2.0), confusions(1, 8.0)
    before, after = (
        {"miou_pct": plain_miou(each.sum(0)), "confusion_per_image": each} for each in (baseline, candidate)
    )
    result = gate(before, after, max_drop=100)
    low, high = result["drop_interval"]
    assert 0 < low < result["drop"] < high


def test_interval_of_other_images_is_refused() -> None:
    with pytest.raises(VssError, match="do not belong together"):
        drop_interval(confusions(0, 1)[:3], confusions(0, 1)[:4])


def test_interval_of_other_masks_is_refused() -> None:
    other = confusions(0, 1)[::-1]
    with pytest.raises(VssError, match="against different masks"):
        drop_interval(confusions(0, 1), other)


def scored(predicted: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    """As `vss.train.evaluate.evaluate` gives it, of labels of three classes."""
    confusion = confusion_per_image(predicted, truth, 3)
    return {**scores(confusion.sum(0)), "confusion_per_image": confusion.numpy()}


def test_networks_are_compared_over_the_classes_in_the_truth_and_both_figures_are_said() -> None:
    """One pixel of a class that the truth has not, against 12 % of all pixels wrong."""
    truth = torch.zeros(4, 100, 100, dtype=torch.int64)
    truth[:, 50:] = 1
    one_pixel, worse = truth.clone(), truth.clone()
    one_pixel[0, 0, 0] = 2
    worse[:, :6], worse[:, 94:] = 1, 0
    baseline, candidate = scored(one_pixel, truth), scored(worse, truth)
    assert baseline["miou_pct"] == pytest.approx(100 * (19999 / 20000 + 1) / 3)  # the field's convention stays
    right, wrong = 100 * (19999 / 20000 + 1) / 2, 100 * 44 / 56  # of each class 44 rows hit, 6 missed, 6 too many
    result = gate(baseline, candidate, max_drop=0.1)
    assert result["passed"] is False
    assert (result["baseline"], result["candidate"]) == pytest.approx((right, wrong))
    assert baseline["miou_truth_pct"] == pytest.approx(right)
    assert result["drop_interval"] == pytest.approx([right - wrong] * 2, abs=0.01)
    both = result["all_classes"]
    assert both["drop"] == pytest.approx(100 * (19999 / 20000 + 1) / 3 - wrong) and both["drop"] < 0
    low, high = both["drop_interval"]  # a draw without the first image has no third class
    assert low == pytest.approx(both["drop"], abs=0.1) and high == pytest.approx(100 - wrong, abs=0.1)
    assert "counted as 0, miou_pct went from 66.6" in result["sentence"]
    without = [
        {key: value for key, value in each.items() if key != "confusion_per_image"} for each in (baseline, candidate)
    ]
    assert gate(*without)["drop"] == pytest.approx(right - wrong)


def test_without_a_limit_nothing_is_judged_and_that_is_said() -> None:
    result = gate({"miou_pct": 50.0}, {"miou_pct": 20.0}, max_drop=None)
    assert result["passed"] is None and result["drop"] == 30.0
    assert result["sentence"] == (
        "not judged: miou_pct went from 50.000 to 20.000, a drop of 30.000 points and no limit is set."
    )
    given = gate({"ap_pct": 50.0}, {"ap_pct": 49.0}, metric="ap_pct", max_drop=1, interval=[-1.0, 3.0])
    assert given["passed"] and "a drop of 1.000 points (95 % interval -1.000 to 3.000) where 1 is" in given["sentence"]
