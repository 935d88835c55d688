"""Figures over seeds against tables and brute force."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from vss.sweep.compare import effects, holm, ranking, summary
from vss.sweep.results import _unequal, write_csv


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
    second = [blocks[key]["b"] - blocks[key]["a"] for key in blocks]  # -1, -1.5, ... -4.5
    assert found["rows"][1]["gap"] == pytest.approx(-2.75) and found["rows"][0]["gap_half"] is None
    assert found["rows"][1]["gap_half"] == pytest.approx(2.364624252 * np.std(second, ddof=1) / 8**0.5)  # t(0.975, 7)
    assert found["least_p"] == 2 / 256 and found["friedman_p"] == pytest.approx(0.000335462628)  # chi2 = 16, 2 degrees


def test_blocks_that_lack_a_criterion_are_left_out_and_ties_share_ranks() -> None:
    found = ranking({"x": {"a": 1.0, "b": 1.0}, "y": {"a": 2.0, "b": 2.0}, "z": {"a": 3.0}})
    assert found["blocks"] == 2 and [row["rank"] for row in found["rows"]] == [1.5, 1.5]
    assert ranking({"x": {"a": 1.0, "b": 2.0}})["rows"][1]["gap_half"] is None  # one block has no interval
    assert found["rows"][1]["p"] == 1.0 and ranking({"x": {"a": 1.0}})["rows"] == []


def test_holm_never_rejects_more_than_bonferroni_allows() -> None:
    for values in itertools.product([0.001, 0.02, 0.3, 0.9], repeat=3):
        found = holm(dict(zip("abc", values, strict=True)))
        for name, value in zip("abc", values, strict=True):
            assert value <= found[name] <= min(1.0, 3 * max(v for v in values if v <= value))


def rows_of(scores: dict[tuple[str, str, str], float]) -> list[dict]:
    axes = ("criterion", "variant", "seed")
    return [{"coords": dict(zip(axes, key, strict=True)), "values": {"miou_pct": v}} for key, v in scores.items()]


def test_the_spread_is_shared_out_as_a_linear_model_of_dummies_does() -> None:
    generator = np.random.default_rng(0)
    names = [("a", "b", "c", "d"), ("own", "even", "lent"), ("0", "1", "2")]
    scores = {key: float(generator.normal()) for key in itertools.product(*names)}
    found = effects(rows_of(scores), "miou_pct")
    assert found is not None

    def explained(*axes: tuple[int, ...]) -> float:
        """The sum of squares that dummies of these axes (and products of them) explain, by least squares."""
        columns = [np.ones(len(scores))]
        for group in axes:
            kinds = sorted({tuple(key[i] for i in group) for key in scores})
            columns += [np.array([float(tuple(key[i] for i in group) == kind) for key in scores]) for kind in kinds]
        design, values = np.stack(columns, axis=1), np.array(list(scores.values()))
        fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
        return float(((fitted - values.mean()) ** 2).sum() / ((values - values.mean()) ** 2).sum())

    for index, axis in enumerate(found["axes"]):
        assert axis["share"] == pytest.approx(explained((index,)))
        blocks = [key[:index] + key[index + 1 :] for key in scores if key[index] == names[index][0]]
        table = [[scores[(*b[:index], level, *b[index:])] for b in blocks] for level in names[index]]
        assert axis["friedman_p"] == pytest.approx(friedmanchisquare(*table).pvalue)
    for (i, j), pair in zip([(0, 1), (0, 2), (1, 2)], found["pairs"], strict=True):
        assert pair["share"] == pytest.approx(explained((i, j)) - explained((i,)) - explained((j,)))
    assert found["rest"] == pytest.approx(1 - explained((0, 1), (0, 2), (1, 2))) and found["left_out"] == []


def test_choices_that_lack_a_combination_are_left_out_by_name() -> None:
    names = [("a", "b"), ("own", "even"), ("0", "1")]
    scores = {key: float(i) for i, key in enumerate(itertools.product(*names))}
    whole = effects(rows_of(scores), "miou_pct")
    scores["dmcp", "own", "0"] = scores["dmcp", "own", "1"] = 50.0
    found = effects(rows_of(scores), "miou_pct")
    assert found is not None and found["left_out"] == ["dmcp"] and found == {**(whole or {}), "left_out": ["dmcp"]}
    assert effects(rows_of({("a", "own", str(i)): float(i) for i in range(3)}), "miou_pct") is None
    assert effects([row | {"values": {}} for row in rows_of(scores)], "miou_pct") is None  # all failed
    level = effects(rows_of({key: float(key[2] == "0") for key in itertools.product("abc", "xyz", "01")}), "miou_pct")
    assert level is not None and [axis["friedman_p"] for axis in level["axes"]] == [None, None, None]


def test_trials_of_other_macs_are_named_and_labelled(tmp_path: Path) -> None:
    kept = {"a": 0.5, "b": 0.495, "c": 0.505, "d": 0.488, "e": 0.511}  # the last two are 2.4 % and 2.2 % off
    rows = [{"id": name, "coords": {"criterion": name}, "values": {"macs_kept": v}} for name, v in kept.items()]
    rows[3]["labels"] = ["naive"]
    (found,) = _unequal(rows)
    assert (found["low"], found["low_kept"], found["high"], found["high_kept"]) == ("d", 0.488, "e", 0.511)
    assert [row.get("labels") for row in rows] == [
        None, None, None, ["naive", "not at equal MACs: -2.4 % from the median"],
        ["not at equal MACs: +2.2 % from the median"],
    ]  # fmt: skip
    assert _unequal(rows[:2]) == []
    groups = [{"name": row["id"], "values": {}, "labels": row.get("labels", [])} for row in rows]
    found = {"axes": [], "columns": [], "baselines": [], "groups": groups}
    with write_csv(found, tmp_path / "table.csv").open() as file:
        lines = {row["name"]: row["labels"] for row in csv.DictReader(file)}
    assert lines["a"] == "" and lines["d"] == "naive; not at equal MACs: -2.4 % from the median"
