"""Curves: where the points go, and an SVG that takes its colours from the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from vss.run.page.charts import MAX_POINTS, curves, lines_of


def test_phases_follow_one_another() -> None:
    phases = {
        "train": [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.0, "val_miou_pct": 40.0}],
        "finetune": [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": None}],
    }
    lines, axis = lines_of(phases, "loss")
    assert axis == "epochs"
    assert [(line.name, line.x, line.y) for line in lines] == [
        ("train", [1, 2], [3.0, 2.0]),
        ("finetune", [3], [2.5]),
    ]


def test_epochs_from_zero_do_not_overlap() -> None:
    points = [{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.0}]
    lines, _ = lines_of({"a": points, "b": points}, "loss")
    assert [line.x for line in lines] == [[1, 2], [3, 4]]


def test_the_control_runs_beside_fine_tuning() -> None:
    points = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    lines, _ = lines_of({"train": points, "finetune": points, "control": points, "more": points}, "loss")
    assert [line.x for line in lines] == [[1, 2], [3, 4], [3, 4], [5, 6]]


def test_steps_where_an_epoch_is_missing() -> None:
    lines, axis = lines_of({"train": [{"step": 10, "loss": 1.0}, {"step": 20, "epoch": 1, "loss": 0.5}]}, "loss")
    assert (axis, lines[0].x) == ("steps", [10, 20])


def test_long_curves_become_means() -> None:
    points = [{"step": i, "loss": float(i % 2)} for i in range(10 * MAX_POINTS)]
    (line,), _ = lines_of({"train": points}, "loss")
    assert len(line.x) == MAX_POINTS
    assert line.y == pytest.approx([0.5] * MAX_POINTS)
    assert line.x[0] == pytest.approx(4.5)


def test_svg_is_inline_and_themed(report: dict[str, Any]) -> None:
    charts = {chart.title: chart for chart in curves(report)}
    assert list(charts) == ["Validation mIoU", "Training loss", "Learning rate"]
    for chart in charts.values():
        ElementTree.fromstring(chart.svg)
        assert chart.svg.startswith("<svg") and "http" not in chart.svg and "xmlns" not in chart.svg
        assert "var(--series-0)" in chart.svg and "var(--series-1)" in chart.svg and "#0a00" not in chart.svg
        assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', chart.svg))
    assert ">best: 55.0<" in charts["Validation mIoU"].svg.replace("\n", "")
    assert charts["Training loss"].alt == "Training loss over epochs: train from 2 to 0.4; finetune from 2 to 0.6667"


def test_drawing_twice_gives_the_same_text_and_ids_never_clash(report: dict[str, Any]) -> None:
    first, second = curves(report), curves(report)
    assert first == second
    ids = [name for chart in first for name in re.findall(r'\sid="([^"]+)"', chart.svg)]
    assert ids and len(ids) == len(set(ids))


def test_nothing_to_draw_draws_nothing() -> None:
    assert curves({}) == []
    assert curves({"curves": {"train": [{"epoch": 1, "loss": 1.0}]}}) == []


def test_settings_of_matplotlib_stay_as_they_were(report: dict[str, Any]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    curves(report)
    assert dict(matplotlib.rcParams) == before
