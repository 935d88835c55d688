"""vss.deploy.gate: a pure function, checked against hand-made numbers and a plain bootstrap loop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from vss.deploy.gate import drop_interval, gate
from vss.errors import VssError


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
    rng = np.random.default_rng(seed)
    base = np.stack([np.diag(row) for row in rng.integers(50, 200, (20, 3))])
    return base + rng.poisson(errors, (20, 3, 3))


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
