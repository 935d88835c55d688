"""The section of missed defects: order, words, pictures, and what stands in for a picture that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.run.page import render
from vss.run.page.panels import missed_defects


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
    found = missed_defects(report(tmp_path, [0.01, 0.39, 0.4]), tmp_path)
    assert found is not None
    assert found["sentence"].startswith(
        "The engine misses 2 of 9 defective images; its threshold, chosen on validation"
    )
    assert [(row[0], row[1], row[2]) for row in found["rows"]] == [
        ("part 0", "missed, score 0.0100", True),
        ("part 1", "missed, score 0.3900", True),
        ("part 2", "found, score 0.4000", False),
    ]
    assert all([cell.name for cell in row[3]] == ["image", "mask", "heat"] for row in found["rows"])
    assert all(cell.uri.startswith("data:image/png;base64,") for row in found["rows"] for cell in row[3])
    page = render(report(tmp_path, [0.01, 0.39, 0.4]), tmp_path)
    assert page.index("part 0") < page.index("part 1") < page.index("part 2") and "Missed defects" in page
    assert page.count("data:image/png") == 9 and "80.0 % AP" in page


def test_nothing_missed_and_a_picture_that_is_gone(tmp_path: Path) -> None:
    data = report(tmp_path, [0.7])
    (tmp_path / "defects" / "0-heat.png").unlink()
    found = missed_defects(data, tmp_path)
    assert found is not None and found["sentence"].endswith("These are the weakest it finds.")
    assert "misses none of 9" in found["sentence"]
    assert [cell.note for cell in found["rows"][0][3]] == ["", "", "defects/0-heat.png is missing"]


def test_other_reports_have_no_such_section_and_no_picture_lies_outside(tmp_path: Path) -> None:
    assert missed_defects({"rows": []}, tmp_path) is None
    data = report(tmp_path, [0.1])
    data["defects"][0]["files"]["image"] = "../outside.png"
    with pytest.raises(VssError, match="outside its own folder"):
        missed_defects(data, tmp_path)
