"""Defects that the engine misses, worst first, and the weakest of those that it finds: image, mask and heat map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.run.page.panels import Cell, data_uri, open_picture, shrink
from vss.run.page.text import number

if TYPE_CHECKING:
    from PIL import Image


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
        cells = [_cell(name, open_picture(root, path)) for name, path in row["files"].items()]
        note = f"{'missed' if row['missed'] else 'found'}, score {number(row['score'], 4)}"
        rows.append((row["id"], note, row["missed"], cells))
    return {"sentence": sentence, "rows": rows}


def _cell(name: str, picture: Image.Image | str) -> Cell:
    """A picture, or the note on why there is none."""
    if isinstance(picture, str):
        return Cell(name, "", picture, False)
    return Cell(name, data_uri(shrink(picture)), "", False)
