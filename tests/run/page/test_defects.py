"""The section of missed defects: order, words, pictures, and what stands in for a picture that is gone."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.run.page import render
from vss.run.page.decisions import _counts, _curves, chosen, decisions, defect_pictures
from vss.train.details import decision_curves
from vss.train.metrics import average_precision


def report(root: Path, scores: list[float], threshold: float = 0.4) -> dict[str, Any]:
    rows = []
    for number, score in enumerate(scores):
        files = {name: f"defects/{number}-{name}.png" for name in ("image", "mask", "heat")}
        for path in files.values():
            (root / path).parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((40, 20, 3), 50 + number, np.uint8)).save(root / path)
        rows.append({"id": f"part {number}", "files": files, "score": score, "missed": score < threshold})
    missed = sum(score < threshold for score in scores)
    engine = {"name": "engine pruned", "tp": 9 - missed, "fn": missed, "threshold": threshold, "ap_pct": 80.0}
    return {"kind": "vss.report", "name": "n", "status": "ok", "rows": [engine], "defects": rows, "classes": []}


def test_order_words_and_pictures(tmp_path: Path) -> None:
    found = defect_pictures(report(tmp_path, [0.01, 0.39, 0.4]), tmp_path)
    assert found is not None
    ((heading, sentence, rows),) = found["parts"]
    assert heading == "Missed defects"
    assert sentence.startswith("The engine misses 2 of 9 defective images; its threshold, chosen on validation")
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("part 0", "missed, score 0.0100", True),
        ("part 1", "missed, score 0.3900", True),
        ("part 2", "found, score 0.4000", False),
    ]
    assert all([cell.name for cell in row[3]] == ["image", "mask", "heat"] for row in rows)
    assert all(cell.uri.startswith("data:image/png;base64,") for row in rows for cell in row[3])
    page = render(report(tmp_path, [0.01, 0.39, 0.4]), tmp_path)
    assert (
        page.index("part 0") < page.index("part 1") < page.index("part 2") and "Missed defects and false alarms" in page
    )
    assert page.count("data:image/png") == 9 and "80.0 % AP" in page


def test_nothing_missed_and_a_picture_that_is_gone(tmp_path: Path) -> None:
    data = report(tmp_path, [0.7])
    (tmp_path / "defects" / "0-heat.png").unlink()
    found = defect_pictures(data, tmp_path)
    assert found is not None
    ((_, sentence, rows),) = found["parts"]
    assert sentence.endswith("These are the weakest it finds.") and "misses none of 9" in sentence
    assert [cell.note for cell in rows[0][3]] == ["", "", "defects/0-heat.png is missing"]


def test_other_reports_have_no_such_section_and_no_picture_lies_outside(tmp_path: Path) -> None:
    assert defect_pictures({"rows": []}, tmp_path) is None
    data = report(tmp_path, [0.1])
    data["defects"][0]["files"]["image"] = "../outside.png"
    with pytest.raises(VssError, match="outside its own folder"):
        defect_pictures(data, tmp_path)


def test_false_alarms_are_shown_as_such(tmp_path: Path) -> None:
    data = report(tmp_path, [0.1, 0.9])
    data["defects"][1]["defective"] = False
    data["rows"][0]["fp"] = 3
    found = defect_pictures(data, tmp_path)
    assert found is not None
    heading, sentence, rows = found["parts"][1]
    assert (heading, sentence) == (
        "False alarms", "The engine calls 3 sound images defective; the 1 with the highest score.",
    )  # fmt: skip
    assert [row[:3] for row in rows] == [("part 1", "false alarm, score 0.9000", True)]
    assert [row[0] for row in found["parts"][0][2]] == ["part 0"]


def test_decisions_mark_the_chosen_threshold(tmp_path: Path) -> None:
    labels = np.array([1, 1, 1, 0, 0, 0], bool)
    curves = decision_curves(labels, np.array([3.0, 1.0, -2.0, 2.0, -1.0, -3.0]), 0.5)
    data = report(tmp_path, [0.1]) | {"decisions": {"baseline": curves, "engine pruned": curves}}
    found = decisions(data)
    assert found is not None and chosen(curves) == 2
    assert found["sentence"] == (
        "At the threshold 0.6225, chosen on validation: 1 missed, 1 false alarm, of 3 defective and 3 sound images. "
        "To miss none of these images, it would call 2 sound ones defective."
    )
    pr, histogram, counts = found["charts"]
    for chart in found["charts"]:
        ElementTree.fromstring(chart.svg)
    assert "recall 66.7 %, precision 66.7 %" in pr.alt and "1 missed, 1 false alarm" in counts.alt
    assert "chosen" in histogram.svg and "chosen" in counts.svg
    html = render(data, tmp_path)
    assert html.index('id="decisions"') < html.index('id="defects"')
    never = decision_curves(labels, np.arange(6.0), 9.0)
    assert chosen(never) is None
    told = decisions({"decisions": {"engine pruned": never}})
    assert told is not None and "no image is called defective" in told["sentence"]


def test_what_is_drawn_is_what_a_threshold_does() -> None:
    from matplotlib.figure import Figure

    draw = np.random.default_rng(2)
    labels = draw.random(60) < 0.4
    scores = np.round(draw.normal(labels * 1.0, 1.0), 1)
    curves = decision_curves(labels, scores, 0.25)
    axes = Figure().add_subplot()
    _counts(axes, curves)
    for line, wrong in zip(axes.lines, (labels, ~labels), strict=False):
        assert line.get_drawstyle() == "steps-post"  # scores fall, so a value holds from its score down to the next
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        for threshold in (-0.55, 0.25, 0.5, 0.85):
            called = scores >= threshold
            expected = (wrong & (~called if wrong is labels else called)).sum()
            assert y[x >= threshold][-1] == expected
    axes = Figure().add_subplot()
    _curves(axes, {"engine pruned": curves})
    recall, precision = (np.asarray(values) for values in axes.lines[0].get_data())
    assert axes.lines[0].get_drawstyle() == "steps-pre"
    assert (np.diff(recall) * precision[1:]).sum() / 100 == pytest.approx(average_precision(labels, scores))
