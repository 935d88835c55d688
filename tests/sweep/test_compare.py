"""Better, worse, within noise: by Welch's interval; between two sweeps and between two runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vss.errors import VssError
from vss.files import write_json
from vss.sweep.compare import compare, judge
from vss.sweep.statistics import summary

from .conftest import dry_grid


def test_welch_against_a_worked_example() -> None:
    a, b = summary([10.0, 11.0, 12.0]), summary([14.0, 15.0, 19.0])
    found = judge(a, b, lower=False)
    # variances 1 and 7, error sqrt(8/3), freedom (8/3)^2 / (1/18 + 49/18) = 2.56, t(0.975, 2.56) = 3.5185
    assert found["change"] == 5.0 and found["half"] == pytest.approx(3.5185 * math.sqrt(8 / 3), rel=1e-3)
    assert found["verdict"] == "within noise"
    assert judge(a, summary([20.0, 21.0, 22.0]), lower=False)["verdict"] == "better"
    assert judge(a, summary([20.0, 21.0, 22.0]), lower=True)["verdict"] == "worse"
    assert judge(summary([1.0]), summary([2.0]), lower=False)["verdict"] == "one value each"
    assert judge(a, a, lower=False)["verdict"] == "same"


def test_two_sweeps_and_what_only_one_has(tmp_path: Path) -> None:
    from vss.sweep import Grid, Settings, sweep

    for name, variants in (("a", "xy"), ("b", "yz")):
        grid = Grid.model_validate(dry_grid({v: {} for v in variants}, seeds=2))
        sweep(grid, tmp_path / name, settings=Settings(workers=1, threads=1))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (found["metric"], found["only_a"], found["only_b"]) == ("score", ["x"], ["z"])
    assert [(row["name"], row["verdict"]) for row in found["rows"]] == [("y", "same"), ("baseline, not pruned", "same")]


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(VssError, match="neither results"):
        compare(tmp_path, tmp_path)
    report = {"kind": "vss.report", "schema": 1, "name": "r", "status": "ok"}
    for name, row in (("a", {"name": "pruned", "miou_pct": 40.0}), ("b", {"name": "other", "miou_pct": 41.0})):
        write_json(tmp_path / name / "report.json", report | {"rows": [row]})
    with pytest.raises(VssError, match="no network in common"):
        compare(tmp_path / "a", tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "a")
    assert found["rows"] == [{"name": "pruned", "metric": "miou_pct", "a": 40.0, "b": 40.0, "change": 0.0,
                              "half": None, "verdict": "same"}]  # fmt: skip
