"""What got better, what got worse and what is within noise between two sweeps or two runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vss.core.errors import VssError
from vss.core.report import read_report
from vss.data import require_classes
from vss.sweep import results
from vss.sweep.results import LEVEL, summary

REPORT = "report.json"
CLOSE = 1e-6  # points: what a row says and what its images give

Verdict = Literal["better", "worse", "within noise", "same", "not judged"]
LOWER = ("macs_g", "params_m", "latency_ms_p50", "size_mib")
EXACT = ("macs_g", "params_m", "size_mib")
"""Counted, not measured: of two runs any difference is one."""
ONE_VALUE = {
    "latency_ms_p50": "times of two runs are of two moments; time both engines in one run with vss bench",
}


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Compare folders of two sweeps (results.json), over their seeds, or of two runs (report.json), over their images.

    Returns:
        `rows`: {"name", "metric", "a", "b", "change", "half", "verdict"} for every network and every figure that both
        have. Of a run's score `interval` is the paired 95 % bootstrap interval of the change over images, in place of
        `half`; `note` says why a row is not judged, or what the field's mean IoU is where it differs. `only_a`,
        `only_b`: names that one of them lacks.
    """
    (first, metric, classes), (second, other, theirs) = _networks(a), _networks(b)
    if classes and theirs:  # older reports have none
        require_classes(str(b), theirs, str(a), classes)
    if metric != other:
        raise VssError(f"{a} is judged by {metric} and {b} by {other}; the two cannot be compared.")
    rows, runs = [], not any((folder / "results.json").is_file() for folder in (a, b))
    for name in [name for name in first if name in second]:
        for key in (metric, *LOWER):
            if key in first[name] and key in second[name]:
                row = {"name": name, "metric": key, **judge(first[name][key], second[name][key], key in LOWER)}
                rows.append(_of_runs(row, a, b, metric) if runs else row)
    if not rows:
        raise VssError(f"{a} and {b} have no network in common; compare sweeps of the same grid.")
    return {
        "metric": metric,
        "rows": rows,
        "only_a": [name for name in first if name not in second],
        "only_b": [name for name in second if name not in first],
    }


def summarise(rows: list[dict[str, Any]]) -> str:
    """How many rows have which verdict, and why some have none."""
    words: tuple[Verdict, ...] = ("better", "worse", "within noise", "same")
    counts = ", ".join(f"{sum(row['verdict'] == word for row in rows)} {word}" for word in words)
    left = [row for row in rows if row["verdict"] == "not judged"]
    if not left:
        return f"{counts}; all {len(rows)} figures were judged"
    default = "one value each says nothing about noise; compare sweeps of several seeds"
    reasons = dict.fromkeys(row.get("note") or ONE_VALUE.get(row["metric"], default) for row in left)
    return f"{counts}, {len(left)} of {len(rows)} not judged: {'; '.join(reasons)}"


def judge(a: dict[str, Any], b: dict[str, Any], lower: bool) -> dict[str, Any]:
    """One figure by Welch's t-interval of the difference of two means.

    Args:
        a, b: `vss.sweep.results.summary`.
        lower: whether less is better.
    """
    change, half = b["mean"] - a["mean"], _half(a, b)
    if change == 0:
        verdict: Verdict = "same"
    elif half is None:
        verdict = "not judged"
    elif abs(change) <= half:
        verdict = "within noise"
    else:
        verdict = "better" if (change < 0) == lower else "worse"
    return {"a": a["mean"], "b": b["mean"], "change": change, "half": half, "verdict": verdict}


def _of_runs(row: dict[str, Any], a: Path, b: Path, metric: str) -> dict[str, Any]:
    """A figure of two runs: scores over images, counts as they are, times not at all."""
    if row["metric"] == metric:
        return _over_images(row, a, b)
    if row["metric"] in EXACT and row["change"]:
        return row | {"verdict": "better" if row["change"] < 0 else "worse"}
    return row


def _over_images(row: dict[str, Any], a: Path, b: Path) -> dict[str, Any]:
    """The row of a score judged by the images of both runs, or the reason why not."""
    from vss.train.gate import comparable

    try:
        tables = [_images(folder, row["name"], row["metric"], row[side]) for folder, side in ((a, "a"), (b, "b"))]
        low, high = _change(tables[0], tables[1], row["metric"])
    except VssError as error:
        return row | {"verdict": "not judged", "note": str(error)}
    found: dict[str, Any] = {"interval": [low, high]}
    if row["metric"] == "miou_pct":
        before, after = (comparable({"miou_pct": 0.0, "confusion_per_image": table}, "miou_pct") for table in tables)
        if max(abs(before - row["a"]), abs(after - row["b"])) > CLOSE:
            found["note"] = f"over the classes in the truth; with all classes {row['a']:.2f} and {row['b']:.2f}"
        found |= {"a": before, "b": after, "change": after - before}
    same = low == high == 0
    found["verdict"] = "same" if same else "better" if low > 0 else "worse" if high < 0 else "within noise"
    return row | found


def _change(first: np.ndarray, second: np.ndarray, metric: str) -> tuple[float, float]:
    """95 % interval of the second run's score minus the first's, over the same images."""
    from vss.train.gate import drop_interval
    from vss.train.tasks.defect import DefectTask, ap_drop_interval

    if metric == "miou_pct":
        low, high = drop_interval(first, second)
        return -high, -low
    if first.shape != second.shape or not np.array_equal(first[:, :2], second[:, :2]):
        raise VssError("the two runs were scored on other images; compare runs on the same data.")
    low, high = ap_drop_interval({DefectTask.per_image: first}, {DefectTask.per_image: second}, part=1)
    return -high, -low


def _images(folder: Path, row: str, metric: str, score: float) -> np.ndarray:
    """The figures by image behind a row of a run; they must give the row's score."""
    import torch

    from vss.train.metrics import average_precision, miou_pct

    artefact = read_report(folder / REPORT).get("artefacts", {}).get(row, {})
    path = folder / artefact.get("files", {}).get("scores", f"scores/{row}.npy")
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VssError(f"{path} (scores by image) cannot be read ({error}); run the recipe again.") from error
    if metric == "miou_pct" and table.ndim == 3:
        own = float(miou_pct(torch.from_numpy(table.sum(0))))
    elif metric == "ap_pct" and table.ndim == 2 and table.shape[1] == 3:
        own = average_precision(table[table[:, 0] == 1, 1].astype(bool), table[table[:, 0] == 1, 2])
    else:
        raise VssError(f"{path} holds no scores by image; run the recipe again.")
    if not abs(own - score) <= CLOSE:
        raise VssError(f"{path} gives {metric} {own:.3f} and the report says {score:.3f}; run the recipe again.")
    return table


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


def _networks(folder: Path) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
    """Name -> {figure: summary}, the figure that networks are judged by, and the classes."""
    if (folder / "results.json").is_file():
        table = results.read(folder)
        named = {group["name"]: group["values"] for group in table["groups"]}
        named |= {f"{base['name']}, not pruned": base["values"] for base in table["baselines"]}
        return named, table["metric"], table.get("classes", [])
    if (folder / REPORT).is_file():
        report = read_report(folder / REPORT)
        rows = report["rows"]
        numbers = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in rows]
        metric = next((key for key in ("miou_pct", "ap_pct") if any(key in row for row in numbers)), "miou_pct")
        named = {row["name"]: found for row, found in zip(rows, numbers, strict=True)}
        found = {name: {k: summary([v]) for k, v in row.items()} for name, row in named.items()}
        return found, metric, report.get("classes", [])
    raise VssError(f"{folder} holds neither results.json of a sweep nor report.json of a run; give such a folder.")
