"""The gates of a run as a table: what was compared, both figures, the change with its interval, limit, verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vss.run.page.text import label, number, signed

WORDS = {True: ("passed", "good"), False: ("failed", "bad"), None: ("not judged", "")}


def gates(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of `report["gate"]["checks"]`; None for a report whose gate is one comparison without a name."""
    checks = [check for check in report.get("gate", {}).get("checks", []) if "drop" in check and "baseline" in check]
    rows = []
    for check in checks:
        rows.append(_row(check["what"], label(check["metric"]), check))
        if "all_classes" in check:
            title = f"{label(check['metric'])}, classes that are only predicted counted as 0"
            rows.append(_row("", title, check["all_classes"]))
    return {"rows": rows} if rows else None


def _row(name: str, figure: str, found: Mapping[str, Any]) -> dict[str, Any]:
    span = found.get("drop_interval")
    limit = found.get("max_drop")
    word, tone = WORDS[found["passed"]] if "passed" in found else ("", "")
    return {
        "name": name,
        "figure": figure,
        "before": number(found["baseline"], 2),
        "after": number(found["candidate"], 2),
        "change": signed(found["candidate"] - found["baseline"], 2),
        "span": f"{signed(-span[1], 2)} to {signed(-span[0], 2)}" if span else "",
        "limit": number(limit, 2) if limit is not None else "none" if "passed" in found else "",
        "word": word,
        "tone": tone,
    }
