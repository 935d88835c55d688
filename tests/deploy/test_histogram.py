"""vss.deploy.quantize.ranges against everything at once in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vss.deploy.quantize.ranges import BINS, LEVELS, AbsHistogram


def filled(chunks: list[np.ndarray]) -> AbsHistogram:
    histogram = AbsHistogram()
    for chunk in chunks:
        histogram.update(chunk)
    return histogram


@pytest.fixture
def chunks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((3, 50, 7)) * scale).astype(np.float32) for scale in (0.02, 5, 1, 0.3, 40)]


def test_counts_are_those_of_all_data_at_once_in_any_order(chunks: list[np.ndarray]) -> None:
    one, other = filled(chunks), filled(chunks[::-1])
    everything = np.abs(np.concatenate([chunk.ravel() for chunk in chunks])).astype(np.float64)
    assert one.limit == other.limit == 2 ** math.ceil(math.log2(everything.max()))
    expected = np.histogram(everything, bins=BINS, range=(0, one.limit))[0]
    assert np.array_equal(one.counts, expected) and np.array_equal(other.counts, expected)
    assert one.amax == everything.max()


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_percentile_is_within_one_bin(chunks: list[np.ndarray], percent: float) -> None:
    histogram = filled(chunks)
    everything = np.abs(np.concatenate([chunk.ravel() for chunk in chunks])).astype(np.float64)
    exact = np.quantile(everything, percent / 100, method="inverted_cdf")
    assert exact <= histogram.percentile(percent) * (1 + 1e-6)
    assert histogram.percentile(percent) <= exact + histogram.limit / BINS
    assert histogram.percentile(100) == histogram.amax


def brute_divergence(counts: np.ndarray, edge: int) -> float:
    """The same definition, bin by bin."""
    inside = [0.0] + [float(count) for count in counts[1:edge]]
    reference = list(inside)
    reference[-1] += float(counts[edge:].sum())
    candidate = [0.0] * edge
    for level in range(LEVELS):
        mine = [i for i in range(edge) if i * LEVELS // edge == level and inside[i] > 0]
        for i in mine:
            candidate[i] = sum(inside[j] for j in mine) / len(mine)
    total, mass = sum(reference), sum(candidate)
    return sum(
        p / total * math.log(p / total / max(q / mass, 1e-12)) for p, q in zip(reference, candidate, strict=True) if p
    )


def test_divergence_is_that_of_the_definition(chunks: list[np.ndarray]) -> None:
    histogram = filled(chunks)
    for edge in (128, 512, 1111):
        assert histogram._divergence(edge) == pytest.approx(brute_divergence(histogram.counts, edge), rel=1e-9)


def test_entropy_cuts_off_an_outlier_and_keeps_a_flat_distribution() -> None:
    rng = np.random.default_rng(1)
    bulk = rng.standard_normal(200_000).astype(np.float32)
    outlier = filled([bulk, np.array([300.0], np.float32)])
    assert 2 < outlier.entropy() < 30 and outlier.amax == 300
    flat = filled([rng.uniform(0, 1, 200_000).astype(np.float32)])
    assert flat.entropy() > 0.9


def test_memory_does_not_grow_and_zeros_count() -> None:
    histogram = AbsHistogram()
    for _ in range(3):
        histogram.update(np.zeros(10, np.float32))
    assert histogram.limit == 0 and histogram.percentile(99) == histogram.entropy() == histogram.amax == 0
    histogram.update(np.array([1.0, 0.0], np.float32))
    assert histogram.counts.sum() == 32 and histogram.counts[0] == 31 and histogram.counts.shape == (BINS,)
    assert histogram.percentile(90) == 1 / BINS


@pytest.mark.parametrize(("bad", "expected"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
def test_what_is_not_finite_stays_seen(bad: float, expected: str) -> None:
    histogram = filled([np.ones(4, np.float32), np.array([1.0, bad], np.float32), np.ones(4, np.float32)])
    assert str(histogram.amax) == expected
