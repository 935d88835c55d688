"""report.json: what goes in comes out, and what is not a report is refused with the key that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vss.core.errors import VssError
from vss.core.report import SCHEMA, Report, read_report, write_report


def minimal(**more: Any) -> dict[str, Any]:
    return {"kind": "vss.report", "schema": 1, "name": "run", "status": "ok", **more}


def test_round_trip_keeps_absent_keys_absent_and_extra_metrics(tmp_path: Path) -> None:
    data = minimal(rows=[{"name": "baseline", "miou_pct": 61.5, "engine_mib": 3.25, "device": "cpu"}])
    assert read_report(write_report(tmp_path / "report.json", data)) == data


def test_kind_and_schema_are_filled_in(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.json", {"name": "run", "status": "failed"})
    assert json.loads(path.read_text()) == {"kind": "vss.report", "schema": SCHEMA, "name": "run", "status": "failed"}


def test_a_report_object_writes_like_its_dictionary(tmp_path: Path) -> None:
    data = minimal(groups=[{"id": "g", "before": 4, "after": 2}])
    assert read_report(write_report(tmp_path / "r.json", Report.model_validate(data))) == data


def test_nan_becomes_null_with_its_reason(tmp_path: Path) -> None:
    rows = [{"name": "a", "miou_pct": float("nan")}, {"name": "b", "speedup": float("inf"), "fps": 2.0}]
    got = read_report(write_report(tmp_path / "report.json", minimal(rows=rows, checks={"x": {"y": -np.inf}})))
    assert got["rows"] == [{"name": "a", "miou_pct": None}, {"name": "b", "speedup": None, "fps": 2.0}]
    assert got["nulls"] == {"rows.0.miou_pct": "was nan", "rows.1.speedup": "was inf", "checks.x.y": "was -inf"}


def test_numpy_paths_and_tuples_become_plain(tmp_path: Path) -> None:
    checks = {"a": np.float32(0.5), "b": np.arange(3), "c": Path("x") / "y", "d": (1, {2})}
    got = read_report(write_report(tmp_path / "report.json", minimal(checks=checks)))
    assert got["checks"] == {"a": 0.5, "b": [0, 1, 2], "c": "x/y", "d": [1, [2]]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"status": "fine"}, "at status"),
        ({"colour": 1}, "at colour"),
        ({"rows": [{"miou_pct": 1.0}]}, "at rows.0.name"),
        ({"rows": [{"name": "a", "miou_pct": 161.0}]}, "at rows.0.miou_pct"),
        ({"rows": [{"name": "a", "extra": {"nested": 1}}]}, "at rows.0.extra"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "two rows share a name"),
        ({"groups": [{"id": "g", "before": 4, "after": 8}]}, "grows from 4 to 8"),
        ({"classes": ["a", "b"], "iou_pct": {"baseline": [1.0]}}, "1 values for 2 classes"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0]]}, "1 colours for 2 classes"),
        ({"palette": [[0, 0, 256]]}, "at palette.0.2"),
        ({"panels": [{"id": "a", "files": {"image": "/etc/image.png"}}]}, "below the report's own folder"),
        ({"panels": [{"id": "a", "files": {"image": "../image.png"}}]}, "below the report's own folder"),
        ({"steps": [{"name": "train", "status": "done"}]}, "at steps.0.status"),
        ({"checks": {"model": object()}}, "a object at checks.model"),
    ],
)
def test_wrong_structure_is_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(VssError, match=sentence):
        write_report(tmp_path / "report.json", minimal(**change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ('{"kind": "vss.plan", "schema": 1}', "expected a file of kind 'vss.report'"),
        ('{"kind": "vss.report", "schema": 99}', "upgrade vss"),
        ('{"kind": "vss.report", "schema": 1, "status": "ok"}', "at name"),
    ],
)
def test_reading_something_else(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(VssError, match=sentence):
        read_report(tmp_path / "report.json")
