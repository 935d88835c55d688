"""Defects that the engine misses, worst first, and the weakest of those that it finds: image, mask and heat map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vss.page.panels import Cell, data_uri, open_picture, shrink
from vss.page.text import number


def missed_defects(report: Mapping[str, Any], root: Path) -> dict[str, Any] | None:
    """{"sentence", "rows": [(id, note, missed, cells)]} in the order of the report; None for other reports."""
    listed = report.get("defects")
    if listed is None:
        return None
    engine: Mapping[str, Any] = next((row for row in report["rows"] if row["name"] == "engine pruned"), {})
    missed, threshold = sum(row["missed"] for row in listed), engine.get("threshold")
    total = sum(int(engine.get(key) or 0) for key in ("tp", "fn"))
    limit = "" if threshold is None else f"; its threshold, chosen on validation, is {number(threshold, 4)}"
    sentence = f"The engine misses {missed or 'none'} of {total} defective images{limit}. "
    sentence += "Lowest score first, then the weakest that it finds." if missed else "These are the weakest it finds."
    rows = []
    for row in listed:
        cells = []
        for name, path in row["files"].items():
            picture = open_picture(root, path)
            absent = isinstance(picture, str)
            cells.append(Cell(name, "" if absent else data_uri(shrink(picture)), picture if absent else "", False))
        note = f"{'missed' if row['missed'] else 'found'}, score {number(row['score'], 4)}"
        rows.append((row["id"], note, row["missed"], cells))
    return {"sentence": sentence, "rows": rows}
