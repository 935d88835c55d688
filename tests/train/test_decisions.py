"""Decision metrics against slow loops, closed forms and torchmetrics."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from vss.core.errors import VssError
from vss.train import metrics as d


def sample(seed: int, *, ties: bool = False, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.25
    labels[:2] = [True, False]
    scores = rng.normal(size=count) + labels
    return labels, np.round(scores * 2) / 2 if ties else scores


def slow_ap(labels: np.ndarray, scores: np.ndarray) -> float:
    """By the definition, threshold by threshold, in fractions."""
    total, before = Fraction(0), Fraction(0)
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = [bool(label) for label, score in zip(labels, scores, strict=True) if score >= threshold]
        recall = Fraction(sum(called), int(labels.sum()))
        total += (recall - before) * Fraction(sum(called), len(called))
        before = recall
    return 100 * float(total)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ap_and_auroc(seed: int, ties: bool) -> None:
    labels, scores = sample(seed, ties=ties)
    pairs = [(p, n) for p in scores[labels] for n in scores[~labels]]
    area = 100 * sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert d.average_precision(labels, scores) == pytest.approx(slow_ap(labels, scores), abs=1e-9)
    assert d.auroc(labels, scores) == pytest.approx(area, abs=1e-9)
    tensors = torch.tensor(scores), torch.tensor(labels).long()
    assert d.average_precision(labels, scores) == pytest.approx(100 * float(binary_average_precision(*tensors)), 1e-4)
    assert d.auroc(labels, scores) == pytest.approx(100 * float(binary_auroc(*tensors)), rel=1e-4)


def test_ap_of_small_rankings_by_hand() -> None:
    labels = np.array([True, False, True, False])
    assert d.average_precision(labels, np.array([4.0, 3, 2, 1])) == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 3))
    assert d.average_precision(labels, np.zeros(4)) == 50.0 and d.auroc(labels, np.zeros(4)) == 50.0
    assert d.average_precision(labels, np.array([2.0, 1, 2, 1])) == 100.0 == d.auroc(labels, np.array([2.0, 1, 2, 1]))
    assert d.auroc(labels, np.array([1.0, 2, 1, 2])) == 0.0


def test_scores_of_any_rising_scale_give_the_same() -> None:
    labels, scores = sample(7)
    for move in (np.exp, np.arctan, lambda x: 3 * x - 8):
        assert d.average_precision(labels, move(scores)) == pytest.approx(d.average_precision(labels, scores))
        assert d.auroc(labels, move(scores)) == pytest.approx(d.auroc(labels, scores))


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_has_the_best_f1_and_the_least_misses_of_those(seed: int) -> None:
    labels, scores = sample(seed, ties=seed % 2 == 0)

    def figures(threshold: float) -> tuple[float, int]:
        called = scores >= threshold
        tp, fn, fp = (called & labels).sum(), (~called & labels).sum(), (called & ~labels).sum()
        return 200 * tp / (2 * tp + fn + fp), int(fn)

    chosen = figures(d.choose_threshold(labels, scores))
    every = [figures(threshold) for threshold in scores]
    best = max(f1 for f1, _ in every)
    assert chosen[0] == pytest.approx(best)
    assert chosen[1] == min(fn for f1, fn in every if f1 == pytest.approx(best))


def test_a_bounded_rate_of_misses_gives_the_highest_such_threshold() -> None:
    labels = np.array([True] * 4 + [False] * 4)
    scores = np.array([9.0, 7, 5, 1, 8, 3, 2, 0])
    assert d.choose_threshold(labels, scores, rule="fnr") == 0.5
    assert d.choose_threshold(labels, scores, rule="fnr", max_fnr_pct=25) == 4.0
    assert d.choose_threshold(labels, scores, rule="fnr", max_fnr_pct=50) == 6.0
    assert d.choose_threshold(np.array([False, True]), np.array([1.0, -2.0]), rule="fnr") == -2.0


def test_counts_by_hand() -> None:
    labels = np.array([True, True, True, False, False, False, False])
    scores = np.array([3.0, 2.0, -1.0, 2.5, 0.0, -1.0, -3.0])
    found = d.at_threshold(labels, scores, 1.0)
    assert [found[key] for key in ("tp", "fp", "fn", "tn")] == [2, 1, 1, 3]
    assert found["recall_pct"] == pytest.approx(200 / 3) and found["fnr_pct"] == pytest.approx(100 / 3)
    assert found["precision_pct"] == pytest.approx(200 / 3) and found["f1_pct"] == pytest.approx(200 / 3)
    assert d.fp_at_zero_fn(labels, scores) == 3
    nothing = d.at_threshold(labels, scores, 99.0)
    assert nothing["precision_pct"] is None and nothing["f1_pct"] == 0 and nothing["fnr_pct"] == 100


def test_curve_ends_at_full_recall_and_the_share_of_defects() -> None:
    labels, scores = sample(3, ties=True)
    curve = d.pr_curve(labels, scores)
    assert curve.recall[-1] == 1 and curve.precision[-1] == labels.mean()
    assert (np.diff(curve.recall) >= 0).all() and (np.diff(curve.threshold) < 0).all()
    assert np.array_equal(curve.true_positives + curve.false_positives, [(scores >= t).sum() for t in curve.threshold])


@pytest.mark.parametrize(("count", "total"), [(0, 18), (1, 18), (18, 18), (3, 7), (250, 1004)])
def test_wilson_equals_scipy(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert d.wilson(count, total) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-12)


def test_wilson_against_the_equation_it_solves() -> None:
    for count, total in ((0, 18), (3, 18), (18, 18), (40, 110)):
        low, high = (value / 100 for value in d.wilson(count, total))
        for edge in {low, high} - {0.0, 1.0}:  # where the rate is that, by definition
            distance = abs(count / total - edge) / (edge * (1 - edge) / total) ** 0.5
            assert distance == pytest.approx(1.959964, abs=1e-5)
        assert low <= count / total <= high and high > low
    assert d.wilson(0, 18)[1] == pytest.approx(17.59, abs=0.01)  # the rule of three says 3 / 18 = 16.7


def test_bootstrap_figures_are_those_of_the_drawn_images() -> None:
    labels, scores = sample(5, ties=True)
    weights = d.draws(labels, samples=6, seed=3)
    assert (weights[:, labels].sum(axis=1) == labels.sum()).all() and (weights.sum(axis=1) == len(labels)).all()
    found = d.resampled_ap(labels, scores, weights), d.resampled_auroc(labels, scores, weights)
    f1 = d.resampled_f1(labels, scores >= 0.5, weights)
    for row, ap, area, f in zip(weights.astype(int), *found, f1, strict=True):
        drawn = np.repeat(np.arange(len(labels)), row)
        assert ap == pytest.approx(slow_ap(labels[drawn], scores[drawn]))
        assert area == pytest.approx(d.auroc(labels[drawn], scores[drawn]))
        assert f == pytest.approx(d.at_threshold(labels[drawn], scores[drawn], 0.5)["f1_pct"])


def test_intervals_cover_the_figure_and_shrink_with_images() -> None:
    small, large = (d.decision_scores(*sample(11, count=count), 0.3) for count in (60, 2400))
    for key in ("ap", "auroc", "f1"):
        widths = [high - low for low, high in (found[f"{key}_interval_pct"] for found in (small, large))]
        assert widths[1] < 0.35 * widths[0]
        low, high = small[f"{key}_interval_pct"]
        assert low <= small[f"{key}_pct"] <= high
    assert small["positives"] + small["negatives"] == 60


@pytest.mark.parametrize(
    ("labels", "scores", "words"),
    [
        ([1, 1], [0.1, 0.2], "every one of 2 images shows a defect"),
        ([0, 0, 0], [0.1, 0.2, 0.3], "shows no defect"),
        ([], [], "shows no defect"),
        ([0, 1], [0.1], "one score for every label"),
        ([0, 1], [0.1, float("nan")], "NaN or infinite"),
    ],
)
def test_bad_input_is_one_sentence(labels: list[int], scores: list[float], words: str) -> None:
    for function in (d.average_precision, d.auroc, d.choose_threshold, d.fp_at_zero_fn):
        with pytest.raises(VssError, match=words):
            function(np.array(labels), np.array(scores))


def test_every_order_of_six_images() -> None:
    labels = np.array([True, True, False, False, False, False])
    values = set()
    for order in itertools.permutations(range(6)):
        scores = np.array(order, float)
        values.add(round(d.average_precision(labels, scores), 9))
        assert d.average_precision(labels, scores) == pytest.approx(slow_ap(labels, scores))
    assert max(values) == 100 and min(values) == pytest.approx(100 * (1 / 5 + 2 / 6) / 2)


def test_map_scores_are_the_average_precision_of_rounded_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    metric = d.MapScores()
    every: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(3):
        truth = torch.rand(2, 9, 7, generator=generator) < 0.2
        logits = 4 * torch.randn(2, 9, 7, generator=generator) + truth
        metric.update(logits, truth)
        every.append((truth.flatten(), ((logits.clamp(-16, 16)) * 100).round().flatten()))
    labels, scores = (torch.cat(parts).numpy() for parts in zip(*every, strict=True))
    assert metric.compute() == pytest.approx(slow_ap(labels, scores), abs=1e-6)
    assert d.MapScores().compute() is None
