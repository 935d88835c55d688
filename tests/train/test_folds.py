"""Out-of-fold decisions against a loop over images in plain Python, and the parts that images fall into."""

from __future__ import annotations

import numpy as np
import pytest

from vss.core.errors import VssError
from vss.train.details import drops, out_of_fold


def tables(seed: int, sizes: tuple[int, ...] = (9, 11, 10, 8, 12)) -> list[np.ndarray]:
    """(n, 2) label and score of five folds, three defects each, scores in steps so that some are equal."""
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        labels = np.arange(size) < 3
        scores = np.round(rng.normal(size=size) + 1.5 * labels, 1)
        found.append(np.stack([labels, scores], 1).astype(float))
    return found


def best_f1(rows: list[tuple[float, float]]) -> float:
    """The lowest threshold of the best F1, half-way to the next score, by trying every score."""
    scores = sorted({score for _, score in rows}, reverse=True)

    def f1(limit: float) -> float:
        hits = sum(label == 1 and score >= limit for label, score in rows)
        called, defects = sum(score >= limit for _, score in rows), sum(label == 1 for label, _ in rows)
        return 2 * hits / (called + defects)

    most = max(f1(limit) for limit in scores)
    last = max(place for place, limit in enumerate(scores) if f1(limit) > most - 1e-12)
    return scores[last] if last + 1 == len(scores) else (scores[last] + scores[last + 1]) / 2


def plain_ap(rows: list[tuple[float, float]]) -> float:
    """Mean over defects of the precision among all images that score no lower, ties together."""
    defects = [score for label, score in rows if label == 1]
    precisions = [
        sum(label == 1 and other >= score for label, other in rows) / sum(other >= score for _, other in rows)
        for score in defects
    ]
    return 100 * sum(precisions) / len(precisions)


@pytest.mark.parametrize("seed", range(4))
def test_every_image_is_judged_at_a_threshold_of_the_other_folds(seed: int) -> None:
    folds = tables(seed)
    found = out_of_fold(folds)
    rows = [[(float(label), float(score)) for label, score in table] for table in folds]
    limits = [best_f1([row for other, part in enumerate(rows) if other != k for row in part]) for k in range(5)]
    judged = [(label, score >= limits[k]) for k, part in enumerate(rows) for label, score in part]
    assert found["thresholds"] == pytest.approx(limits, abs=1e-12)
    assert found["called"].tolist() == [called for _, called in judged]
    assert found["fn"] == sum(label == 1 and not called for label, called in judged)
    assert found["fp"] == sum(label == 0 and called for label, called in judged)
    assert found["positives"] == 15 and found["negatives"] == 35
    assert found["fnr_pct"] == pytest.approx(100 * found["fn"] / 15)
    everything = [row for part in rows for row in part]
    assert found["ap_pct"] == pytest.approx(plain_ap(everything))
    assert found["threshold_logit"] == pytest.approx(best_f1(everything))


def test_the_rule_of_few_misses_holds_on_the_folds_that_choose() -> None:
    folds = tables(7)
    found = out_of_fold(folds, rule="fnr", max_fnr_pct=0.0)
    for place, limit in enumerate(found["thresholds"]):
        others = np.concatenate([table for other, table in enumerate(folds) if other != place])
        assert (others[others[:, 0] == 1, 1] >= limit).all()


def test_intervals_of_two_networks_pair_the_images() -> None:
    before, after = out_of_fold(tables(1)), out_of_fold(tables(2))
    assert drops(before, before) == {"ap_pct": [0.0, 0.0], "fnr_pct": [0.0, 0.0]}
    spans = drops(before, after)
    middle = {"ap_pct": before["ap_pct"] - after["ap_pct"], "fnr_pct": after["fnr_pct"] - before["fnr_pct"]}
    for key, (low, high) in spans.items():
        assert low < high and low - 1e-9 <= middle[key] <= high + 1e-9
    # the increase of misses is a mean over defects: its interval is that of resampling the 15 differences
    rng = np.random.default_rng(5)
    labels = before["labels"]
    gaps = before["called"][labels].astype(float) - after["called"][labels]
    plain = [100 * gaps[rng.integers(0, 15, 15)].mean() for _ in range(20000)]
    assert spans["fnr_pct"] == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=7)


def test_what_is_no_cross_validation_is_refused() -> None:
    with pytest.raises(VssError, match="1 folds came; a threshold that others choose needs 2 or more"):
        out_of_fold(tables(0)[:1])
    with pytest.raises(VssError, match="scored on other images; cross-validate both on the same folds"):
        drops(out_of_fold(tables(0)), out_of_fold(tables(0)[1:] + tables(0)[:1]))
    none = [np.array([[0.0, 1.0], [0.0, 2.0]])] * 2
    with pytest.raises(VssError, match="every one of 2 images shows no defect"):
        out_of_fold(none)
