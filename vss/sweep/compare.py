"""What got better, what got worse and what is within noise between two sweeps or two runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from vss.errors import VssError
from vss.report import read_report
from vss.sweep import results
from vss.sweep.statistics import LEVEL, summary

Verdict = Literal["better", "worse", "within noise", "one value each", "same"]
LOWER = ("macs_g", "params_m", "latency_ms_p50", "size_mib")


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Compare folders of two sweeps (results.json) or of two runs (report.json).

    Returns:
        `rows`: {"name", "metric", "a", "b", "change", "half", "verdict"} for every network that both have and every
        figure that is judged; `only_a`, `only_b`: names that one of them lacks.
    """
    (first, metric), (second, other) = _networks(a), _networks(b)
    if metric != other:
        raise VssError(f"{a} is judged by {metric} and {b} by {other}; the two cannot be compared.")
    rows = []
    for name in [name for name in first if name in second]:
        for key in (metric, *LOWER):
            if key in first[name] and key in second[name]:
                rows.append({"name": name, "metric": key, **judge(first[name][key], second[name][key], key in LOWER)})
    if not rows:
        raise VssError(f"{a} and {b} have no network in common; compare sweeps of the same grid.")
    return {
        "metric": metric,
        "rows": rows,
        "only_a": [name for name in first if name not in second],
        "only_b": [name for name in second if name not in first],
    }


def judge(a: dict[str, Any], b: dict[str, Any], lower: bool) -> dict[str, Any]:
    """One figure by Welch's t-interval of the difference of two means.

    Args:
        a, b: `vss.sweep.statistics.summary`.
        lower: whether less is better.
    """
    change, half = b["mean"] - a["mean"], _half(a, b)
    if change == 0:
        verdict: Verdict = "same"
    elif half is None:
        verdict = "one value each"
    elif abs(change) <= half:
        verdict = "within noise"
    else:
        verdict = "better" if (change < 0) == lower else "worse"
    return {"a": a["mean"], "b": b["mean"], "change": change, "half": half, "verdict": verdict}


def _half(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    from scipy.stats import t

    if a["n"] < 2 or b["n"] < 2:
        return None
    parts = [entry["sd"] ** 2 / entry["n"] for entry in (a, b)]
    error = sum(parts)
    if error == 0:
        return 0.0
    freedom = error**2 / sum(p**2 / (e["n"] - 1) for p, e in zip(parts, (a, b), strict=True))
    return float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(error)


def _networks(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Name -> {figure: summary}, and the figure that networks are judged by."""
    if (folder / "results.json").is_file():
        table = results.read(folder)
        named = {group["name"]: group["values"] for group in table["groups"]}
        return named | {f"{base['name']}, not pruned": base["values"] for base in table["baselines"]}, table["metric"]
    if (folder / "report.json").is_file():
        rows = read_report(folder / "report.json")["rows"]
        numbers = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in rows]
        metric = next((key for key in ("miou_pct", "ap_pct") if any(key in row for row in numbers)), "miou_pct")
        named = {row["name"]: found for row, found in zip(rows, numbers, strict=True)}
        return {name: {k: summary([v]) for k, v in found.items()} for name, found in named.items()}, metric
    raise VssError(f"{folder} holds neither results.json of a sweep nor report.json of a run; give such a folder.")
