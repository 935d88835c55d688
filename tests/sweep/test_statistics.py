"""Figures over seeds against tables and brute force."""

from __future__ import annotations

import itertools

import pytest

from vss.sweep.results import holm, ranking, summary


def test_interval_of_a_mean_by_the_t_table() -> None:
    found = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0 and found["sd"] == pytest.approx(2.5**0.5)
    assert found["half"] == pytest.approx(2.776445105 * (2.5 / 5) ** 0.5)  # t(0.975, 4)
    assert summary([7.0]) == {"n": 1, "mean": 7.0, "sd": None, "half": None}


def test_ranks_wins_and_p_of_a_case_that_can_be_counted() -> None:
    blocks = {str(i): {"a": 10.0 + i, "b": 9.0 + i / 2, "c": 1.0 - i / 3} for i in range(8)}
    found = ranking(blocks)
    assert [(row["name"], row["rank"], row["wins"]) for row in found["rows"]] == [("a", 1, 8), ("b", 2, 0), ("c", 3, 0)]
    # all eight signs agree: two of 2**8 sign patterns are as extreme; two comparisons after Holm
    assert [row["p"] for row in found["rows"]] == [None, pytest.approx(2 * 2 / 256), pytest.approx(2 * 2 / 256)]
    assert found["least_p"] == 2 / 256 and found["friedman_p"] == pytest.approx(0.000335462628)  # chi2 = 16, 2 degrees


def test_blocks_that_lack_a_criterion_are_left_out_and_ties_share_ranks() -> None:
    found = ranking({"x": {"a": 1.0, "b": 1.0}, "y": {"a": 2.0, "b": 2.0}, "z": {"a": 3.0}})
    assert found["blocks"] == 2 and [row["rank"] for row in found["rows"]] == [1.5, 1.5]
    assert found["rows"][1]["p"] == 1.0 and ranking({"x": {"a": 1.0}})["rows"] == []


def test_holm_never_rejects_more_than_bonferroni_allows() -> None:
    for values in itertools.product([0.001, 0.02, 0.3, 0.9], repeat=3):
        found = holm(dict(zip("abc", values, strict=True)))
        for name, value in zip("abc", values, strict=True):
            assert value <= found[name] <= min(1.0, 3 * max(v for v in values if v <= value))
