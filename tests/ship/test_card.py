"""The figures of a model card."""

from __future__ import annotations

import numpy as np
import pytest

from vss.ship.source import pairs, show
from vss.train.gate import miou_interval


def test_the_interval_is_that_of_resampled_images() -> None:
    rng = np.random.default_rng(3)
    confusion = rng.integers(0, 50, (12, 4, 4)) + 60 * np.eye(4, dtype=np.int64)
    low, high = miou_interval(confusion, samples=2000, seed=1)
    drawn = []
    for _ in range(2000):
        total = confusion[rng.integers(0, 12, 12)].sum(0).astype(np.float64)
        hits = np.diag(total)
        drawn.append(100 * (hits / (total.sum(0) + total.sum(1) - hits)).mean())
    assert low == pytest.approx(np.percentile(drawn, 2.5), abs=0.4)
    assert high == pytest.approx(np.percentile(drawn, 97.5), abs=0.4)
    assert miou_interval(np.repeat(confusion[:1], 5, 0)) == pytest.approx((low, low), abs=20)


def test_numbers_in_text() -> None:
    assert (show(12.34567), show(3), show("x")) == ("12.35", "3", "x")
    assert pairs({"kind": "macs", "keep": 0.5}) == "kind macs, keep 0.5"
