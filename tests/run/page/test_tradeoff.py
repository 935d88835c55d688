"""Score against latency: the front against brute force, the level at equal latency by hand, and where it is told."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from vss.run.page import context
from vss.run.page.charts import NOBODY, Point, pareto, points_of, trade_off, worth


def test_pareto_is_what_no_other_point_beats() -> None:
    draw = random.Random(0)
    points = [(draw.randrange(12), draw.randrange(12)) for _ in range(60)]

    def beaten(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return b != a and b[0] <= a[0] and b[1] >= a[1]

    expected = {p for p in points if not any(beaten(p, q) for q in points)}
    found = [points[i] for i in pareto(points)]
    assert set(found) == expected and len(found) == len(set(found)) and found == sorted(found)


BASE, PRUNED = Point("engine baseline", 40.0, 60.0), Point("engine pruned", 20.0, 55.0)


def small(ms: float, score: float) -> Point:
    return Point("reference unet width=8", ms, score)


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        # a third of the way from (10, 40) to (40, 60) is 46.67
        ([BASE, PRUNED, small(10, 40)], "is at 46.67 % mIoU: +8.33 points for the pruned network, so pruning pays."),
        ([BASE, PRUNED, small(19, 56)], "reaches 56.00 % mIoU, +1.00 points against the pruned network: pruning does"),
        ([BASE, PRUNED, small(18, 54.9)], "is at 55.36 % mIoU: \u22120.36 points for the pruned network, so a smaller"),
        ([Point("engine baseline", 15, 50), PRUNED], "+5.00 points of mIoU over the best of the rest, unpruned."),
        ([BASE, PRUNED, small(25, 58)], NOBODY),
        ([BASE, small(10, 40)], ""),
    ],
)
def test_what_pruning_is_worth_at_equal_latency(points: list[Point], sentence: str) -> None:
    found = worth(points, "mIoU")
    assert sentence in found and (found or not sentence)


def timed(report: dict[str, Any]) -> dict[str, Any]:
    """With a reference, all three engines in one run."""
    row = {"name": "reference unet width=8", "miou_pct": 50.0, "latency_ms_p50": 13.0, "labels": "not pruned"}
    names = ("engine baseline", "engine pruned", "reference unet width=8")
    bench = {"engine": {"stable": True, "sessions": {name: {"latency_ms_p90": 1.0} for name in names}}}
    return report | {"rows": [*report["rows"], row], "bench": bench}


def test_only_engines_of_the_same_run_are_compared(report: dict[str, Any]) -> None:
    found = points_of(timed(report))
    assert found == [
        Point("engine baseline", 42.0, 61.34),
        Point("engine pruned", 26.0, 61.02),
        Point("reference unet width=8", 13, 50),
    ]
    assert points_of(report) == []
    by_macs = trade_off(report)
    assert by_macs is not None and by_macs.sentence == "" and "MACs stand in" in by_macs.note
    assert by_macs.chart.alt.startswith(
        "mIoU against MACs: unpruned 8 G 61.34 %, not beaten; pruned and fine-tuned 4 G"
    )
    same = [{**row, "macs_g": 1.0} for row in report["rows"]]
    assert trade_off(report | {"rows": same}) is None


def test_the_unpruned_network_counts_as_long_trained_as_the_others(report: dict[str, Any]) -> None:
    rows = [row for row in timed(report)["rows"] if row["name"] != "control"]
    found = points_of(timed(report) | {"rows": [*rows, {"name": "control", "miou_pct": 62.0}]})
    assert found[0] == Point("control", 42.0, 62.0)
    assert [point.name for point in found[1:]] == ["engine pruned", "reference unet width=8"]
    # (26 - 13) / (42 - 13) of the way from 50 to 62
    assert "between unet width=8 and unpruned control, is at 55.38 % mIoU: +5.64 points" in worth(found, "mIoU")


def test_the_page_draws_every_network_and_says_whether_to_prune(report: dict[str, Any], tmp_path: Path) -> None:
    page = context(timed(report), tmp_path)
    _, data = page["sections"]["tradeoff"]
    ElementTree.fromstring(data.chart.svg)
    assert all(
        f">{name}<" in data.chart.svg
        for name in ("unpruned", "pruned", "unet width=8", "none costs less and is better")
    )
    assert data.chart.alt.count("not beaten") == 3
    # (26 - 13) / (42 - 13) of the way from 50 to 61.34
    assert data.sentence in page["verdict"].sentences and "is at 55.08 % mIoU: +5.94 points" in data.sentence
    assert data.chart.title == "mIoU against latency"
    without = timed(report)
    without["rows"] = [{**row, "latency_ms_p50": None} for row in without["rows"]]
    assert context(without, tmp_path)["sections"]["tradeoff"][1].chart.title == "mIoU against MACs"
