"""What the page shows beside scores: against counts, loops and torchmetrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vss.core.errors import VssError
from vss.core.report import read_report, write_report
from vss.train.details import (
    LOST,
    LOWEST,
    class_drop_intervals,
    decision_curves,
    image_ious,
    listed_images,
    worst_images,
)

CLASSES, IMAGES = 4, 12


def maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth with void, and two predictions, the second worse; class 3 is nowhere."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, (IMAGES, 8, 9))
    before, after = (
        np.where(draw.random(truth.shape) < p, draw.integers(0, 3, truth.shape), truth) for p in (0.2, 0.5)
    )
    truth[draw.random(truth.shape) < 0.1] = 255
    truth[5] = 255
    return truth, before, after


def counted(truth: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """(n, K, K) counts, pixel by pixel."""
    found = np.zeros((IMAGES, CLASSES, CLASSES), np.int64)
    for image, row, column in np.argwhere(truth != 255):
        found[image, truth[image, row, column], guess[image, row, column]] += 1
    return found


def iou(truth: np.ndarray, guess: np.ndarray) -> list[float]:
    valid = truth != 255
    sets = [((truth == k) & valid, (guess == k) & valid) for k in range(CLASSES)]
    return [100 * (a & b).sum() / (a | b).sum() if (a | b).any() else np.nan for a, b in sets]


def test_images_are_ranked_by_their_own_iou() -> None:
    truth, before, after = maps()
    own = np.full((2, IMAGES), np.nan)
    for index in [i for i in range(IMAGES) if i != 5]:  # that one is void
        for place, guess in enumerate((before, after)):
            values = iou(truth[index], guess[index])
            own[place, index] = np.mean([value for k, value in enumerate(values) if (truth[index] == k).any()])
    found = np.array([image_ious(counted(truth, guess)) for guess in (before, after)])
    np.testing.assert_allclose(found, own, equal_nan=True)
    chosen = worst_images(*found, 6)
    order = [int(i) for i in np.argsort(own[1]) if i != 5]
    assert chosen[:3] == [(i, LOWEST) for i in order[:3]]
    left = sorted((i for i in order if i not in order[:3]), key=lambda i: own[1][i] - own[0][i])
    assert chosen[3:] == [(i, LOST) for i in left[:3]]
    assert sorted(i for i, _ in worst_images(*found, 99)) == [i for i in range(IMAGES) if i != 5]
    assert worst_images(found[1], found[1], 2) == [(order[0], LOWEST), (order[1], LOWEST)]  # nothing was lost


def test_an_image_says_what_it_confuses_most() -> None:
    truth, before, after = maps()
    counts = {"baseline": counted(truth, before), "engine pruned": counted(truth, after)}
    rows = listed_images([f"image {i}" for i in range(IMAGES)], counts, 4)
    for row in rows:
        index = int(row["id"].split()[1])
        pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
        wrong = {(a, b): ((truth[index] == a) & (after[index] == b)).sum() for a, b in pairs}
        most = max(wrong.values())
        valid = (truth[index] != 255).sum()
        assert row["confused"][2] == pytest.approx(100 * most / valid)
        assert wrong[tuple(row["confused"][:2])] == most and list(row["scores"]) == list(counts)
    same = {name: counted(truth, truth) for name in counts}
    assert "confused" not in listed_images(["x"] * IMAGES, same, 1)[0]


def test_class_intervals_are_those_of_drawing_images_again() -> None:
    truth, before, after = maps()
    first, second = counted(truth, before), counted(truth, after)
    found = class_drop_intervals(first, second)
    assert found[3] is None
    draw = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=1000)
    drops = []
    for weights in draw:
        chosen = np.repeat(np.arange(IMAGES), weights)
        pair = [m[chosen].sum(0) for m in (first, second)]
        drops.append([[m[k, k] / (m[k].sum() + m[:, k].sum() - m[k, k]) for m in pair] for k in range(3)])
    loss = 100 * (np.array(drops)[:, :, 0] - np.array(drops)[:, :, 1])
    np.testing.assert_allclose(found[:3], np.percentile(loss, [2.5, 97.5], axis=0).T)


def test_curves_of_decisions() -> None:
    from torchmetrics.functional.classification import binary_precision_recall_curve

    draw = np.random.default_rng(1)
    labels = draw.random(200) < 0.3
    scores = np.round(draw.normal(labels * 2.0, 1.5), 2)
    found = decision_curves(labels, scores, 0.5)
    precision, recall, thresholds = binary_precision_recall_curve(
        torch.sigmoid(torch.from_numpy(scores)), torch.from_numpy(labels).int()
    )
    np.testing.assert_allclose(1 / (1 + np.exp(-np.array(found["score"][::-1]))), thresholds, rtol=1e-6)
    np.testing.assert_allclose(found["precision_pct"][::-1], 100 * precision[:-1], rtol=1e-5)
    np.testing.assert_allclose(found["recall_pct"][::-1], 100 * recall[:-1], rtol=1e-5)
    for score, misses, alarms in zip(found["score"], found["misses"], found["false_alarms"], strict=True):
        called = scores >= score
        assert (misses, alarms) == ((labels & ~called).sum(), (~labels & called).sum())
    assert (sum(found["defective"]), sum(found["sound"])) == (labels.sum(), (~labels).sum())
    many = decision_curves(np.arange(3000) % 2, np.linspace(0, 1, 3000), 0.5)
    assert len(many["score"]) == 400 and (many["misses"][-1], many["false_alarms"][-1]) == (0, 1500)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"classes": ["a", "b"], "confusion": {"baseline": [[1, 2], [3]]}}, "'baseline' is not 2 x 2"),
    ({"classes": ["a"], "class_drops": {"baseline": [None, [0, 1]]}}, "2 intervals for 1 classes"),
    ({"classes": ["a"], "worst": [{"id": "x", "why": "", "scores": {}, "confused": [0, 1, 2.0]}]}, "class 1 of 1"),
    ({"decisions": {"baseline": decision_curves(np.array([0, 1]), np.array([0.0, 1.0]), 0.5) | {"misses": [1]}}},
     "2 scores"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), BAD)
def test_what_does_not_fit_is_refused(content: dict[str, Any], words: str, tmp_path: Any) -> None:
    with pytest.raises(VssError, match=words):
        write_report(tmp_path / "report.json", {"name": "x", "status": "ok", **content})


def test_old_reports_are_read(tmp_path: Any) -> None:
    old = {"kind": "vss.report", "schema": 1, "name": "x", "status": "ok"}
    panel = {"id": "a", "files": {"image": "a.png"}, "score": 0.1, "missed": True}
    write_report(tmp_path / "report.json", old | {"defects": [panel]})
    assert read_report(tmp_path / "report.json")["defects"] == [panel]
