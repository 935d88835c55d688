"""Better, worse, within noise: by Welch's interval; between two sweeps and between two runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vss.core.errors import VssError
from vss.core.files import write_json
from vss.sweep.compare import compare, judge, summarise, summary
from vss.train.gate import drop_interval
from vss.train.metrics import average_precision, scores

from .conftest import dry_grid


def test_welch_against_a_worked_example() -> None:
    a, b = summary([10.0, 11.0, 12.0]), summary([14.0, 15.0, 19.0])
    found = judge(a, b, lower=False)
    # variances 1 and 7, error sqrt(8/3), freedom (8/3)^2 / (1/18 + 49/18) = 2.56, t(0.975, 2.56) = 3.5185
    assert found["change"] == 5.0 and found["half"] == pytest.approx(3.5185 * math.sqrt(8 / 3), rel=1e-3)
    assert found["verdict"] == "within noise"
    assert judge(a, summary([20.0, 21.0, 22.0]), lower=False)["verdict"] == "better"
    assert judge(a, summary([20.0, 21.0, 22.0]), lower=True)["verdict"] == "worse"
    assert judge(summary([1.0]), summary([2.0]), lower=False)["verdict"] == "not judged"
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
    (row,) = compare(tmp_path / "a", tmp_path / "a")["rows"]
    assert (row["change"], row["verdict"]) == (0.0, "not judged")  # there are no scores by image
    assert "scores/pruned.npy (scores by image) cannot be read" in row["note"]


def a_run(folder: Path, table: np.ndarray, metric: str, **row: float) -> Path:
    """A report with one row, of these scores by image."""
    if metric == "miou_pct":
        value = scores(torch.from_numpy(table.sum(0)))[metric]
    else:
        value = average_precision(table[:, 1].astype(bool), table[:, 2])
    (folder / "scores").mkdir(parents=True)
    np.save(folder / "scores/finetuned.npy", table)
    report = {"kind": "vss.report", "schema": 1, "name": "r", "status": "ok"}
    write_json(folder / "report.json", report | {"rows": [{"name": "finetuned", metric: value, **row}]})
    return folder


def segmented(wrong: int, seed: int = 0) -> np.ndarray:
    """30 images of two classes with about so many wrong pixels of 100 in each class."""
    errors = np.random.default_rng(seed).binomial(100, wrong / 100, (30, 2))
    return np.stack([np.array([[100 - a, a], [b, 100 - b]]) for a, b in errors])


def test_two_runs_are_judged_over_their_images(tmp_path: Path) -> None:
    base = a_run(tmp_path / "a", segmented(10), "miou_pct", macs_g=2.0, latency_ms_p50=5.0)
    other = a_run(tmp_path / "b", segmented(40), "miou_pct", macs_g=1.0, latency_ms_p50=4.0)
    found = compare(base, other)
    rows = {row["metric"]: row for row in found["rows"]}
    assert {key: row["verdict"] for key, row in rows.items()} == {
        "miou_pct": "worse", "macs_g": "better", "latency_ms_p50": "not judged",
    }  # fmt: skip
    low, high = rows["miou_pct"]["interval"]
    assert low < rows["miou_pct"]["change"] < high < 0
    assert [low, high] == [-x for x in reversed(drop_interval(segmented(10), segmented(40)))]
    assert summarise(found["rows"]).startswith(
        "1 better, 1 worse, 0 within noise, 0 same, 1 of 3 not judged: times of two"
    )
    assert compare(other, base)["rows"][0]["verdict"] == "better"
    near = a_run(tmp_path / "c", segmented(10, seed=1), "miou_pct")
    assert compare(base, near)["rows"][0]["verdict"] == "within noise"
    assert compare(base, base)["rows"][0]["verdict"] == "same"


@pytest.mark.parametrize(
    ("classes", "words"),
    [(["road", "sky"], "same names in another order"), (["sky"], "has 1 class "), (["Sky", "ROAD"], "")],
)
@pytest.mark.parametrize("file", ["report.json", "results.json"])
def test_other_classes_are_not_compared(tmp_path: Path, classes: list[str], words: str, file: str) -> None:
    values = {"miou_pct": summary([40.0, 41.0])}
    for name, own in (("a", ["sky", "road"]), ("b", classes)):
        found = {"kind": "vss.sweep_results", "schema": 1, "metric": "miou_pct", "baselines": []}
        found |= {"groups": [{"name": "x", "values": values}]}
        if file == "report.json":
            found = {"kind": "vss.report", "schema": 1, "name": "r", "status": "ok"}
            found |= {"rows": [{"name": "x", "miou_pct": 4.0}]}
        write_json(tmp_path / name / file, found | {"classes": own})
    if not words:
        assert [row["name"] for row in compare(tmp_path / "a", tmp_path / "b")["rows"]] == ["x"]
        return
    with pytest.raises(VssError, match=words):
        compare(tmp_path / "a", tmp_path / "b")


def test_runs_on_other_images_and_scores_of_another_report_are_not_judged(tmp_path: Path) -> None:
    base = a_run(tmp_path / "a", segmented(10), "miou_pct")
    other = a_run(tmp_path / "b", segmented(10)[:20], "miou_pct")
    (row,) = compare(base, other)["rows"]
    assert row["verdict"] == "not judged" and "do not belong together" in row["note"]
    np.save(other / "scores/finetuned.npy", segmented(50))
    (row,) = compare(base, other)["rows"]
    assert row["verdict"] == "not judged" and "and the report says" in row["note"]


def test_two_runs_on_defects_are_judged_over_their_images(tmp_path: Path) -> None:
    labels = np.arange(60) % 3 == 0
    rng = np.random.default_rng(0)
    good, bad = (np.stack([np.ones(60), labels, rng.normal(size=60) + shift * labels], 1) for shift in (6, 0))
    (row,) = compare(a_run(tmp_path / "a", good, "ap_pct"), a_run(tmp_path / "b", bad, "ap_pct"))["rows"]
    assert row["verdict"] == "worse" and row["interval"][1] < 0
    moved = np.concatenate([good[1:], good[:1]])
    (row,) = compare(tmp_path / "a", a_run(tmp_path / "c", moved, "ap_pct"))["rows"]
    assert row["verdict"] == "not judged" and "scored on other images" in row["note"]
