"""What is better and what is within noise: criteria of one sweep, the axes of its grid, and two sweeps or two runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vss.core.errors import VssError
from vss.core.files import read_json
from vss.core.report import read_report
from vss.data import require_classes
from vss.run.page.sweep import KIND, SCHEMA
from vss.sweep.experiment import Json

LEVEL = 0.95
REPORT = "report.json"
CLOSE = 1e-6  # points: what a row says and what its images give

Verdict = Literal["better", "worse", "within noise", "same", "not judged"]
LOWER = ("macs_g", "params_m", "latency_ms_p50", "size_mib")
EXACT = ("macs_g", "params_m", "size_mib")
"""Counted, not measured: of two runs any difference is one."""
ONE_VALUE = {
    "latency_ms_p50": "times of two runs are of two moments; time both engines in one run with vss bench",
}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and half-width of the 95 % t-interval of the mean; the latter two need two values."""
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"n": count, "mean": mean, "sd": None, "half": None}
    sd = statistics.stdev(values)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    return {"n": count, "mean": mean, "sd": sd, "half": half}


def ranking(blocks: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Criteria ranked within blocks (one network, budget and seed each) and compared with the best.

    Ranks as in Demsar (2006): 1 is best, ties share their mean rank; the Friedman test asks whether criteria differ at
    all, the Wilcoxon signed-rank test whether one differs from the best, corrected after Holm.

    Args:
        blocks: block -> {criterion: score, higher is better}; blocks that lack a criterion are left out.

    Returns:
        `rows` [{"name", "rank", "mean", "wins", "gap": mean difference to the best in a block, "gap_half": half-width
        of its 95 % t-interval, or None, "p": corrected, or None}], best first; `blocks` used; `friedman_p` or None;
        `least_p`: the smallest p that so many blocks can give.
    """
    from scipy.stats import friedmanchisquare, rankdata, wilcoxon

    names = list(dict.fromkeys(name for block in blocks.values() for name in block))
    whole = [block for block in blocks.values() if all(name in block for name in names)]
    if not whole or len(names) < 2:
        return {"rows": [], "blocks": len(whole), "friedman_p": None, "least_p": None}
    table = [[block[name] for name in names] for block in whole]
    ranks = [rankdata([-value for value in row]) for row in table]
    mean_rank = {name: sum(float(row[i]) for row in ranks) / len(ranks) for i, name in enumerate(names)}
    scores = {name: [row[i] for row in table] for i, name in enumerate(names)}
    order = sorted(names, key=lambda name: (mean_rank[name], -statistics.fmean(scores[name])))
    pairs = {name: [b - a for a, b in zip(scores[order[0]], scores[name], strict=True)] for name in order[1:]}
    between = {name: summary(gaps) for name, gaps in pairs.items()}
    corrected = holm({name: float(wilcoxon(gaps).pvalue) if any(gaps) else 1.0 for name, gaps in pairs.items()})
    rows = [
        {
            "name": name,
            "rank": mean_rank[name],
            "mean": statistics.fmean(scores[name]),
            "wins": sum(block[name] == max(block[other] for other in names) for block in whole),
            "gap": between[name]["mean"] if name in between else 0.0,
            "gap_half": between[name]["half"] if name in between else None,
            "p": corrected.get(name),
        }
        for name in order
    ]
    friedman = None
    if len(names) > 2 and len(whole) > 1 and any(len(set(row)) > 1 for row in table):
        friedman = float(friedmanchisquare(*scores.values()).pvalue)
    return {"rows": rows, "blocks": len(whole), "friedman_p": friedman, "least_p": min(1.0, 2.0 ** (1 - len(whole)))}


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    result, largest = {}, 0.0
    for index, (name, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(values) - index)))
        result[name] = largest
    return result


def effects(rows: Sequence[Json], metric: str) -> Json | None:
    """How much of the spread of a score goes with each axis, and with pairs of axes: an analysis of variance.

    Sums of squares of a balanced design (Fisher 1925) as shares of the total; what neither an axis nor a pair explains,
    noise and what needs three axes at once, is `rest`. An axis has a Friedman test over all others as blocks.

    Args:
        rows: trials with `coords` and `values`; choices that not every combination has are left out, emptiest first.

    Returns:
        `axes` [{"name", "levels", "share", "friedman_p"}], `pairs` [{"name", "share"}], `rest`, `cells`, `left_out`;
        None where fewer than two axes have two choices each, or all scores are equal.
    """
    from scipy.stats import friedmanchisquare

    cells = {tuple(sorted(row["coords"].items())): row["values"].get(metric) for row in rows}
    cells = {coords: score for coords, score in cells.items() if score is not None}
    axes = list(dict.fromkeys(axis for row in rows for axis in row["coords"]))
    levels = {axis: list(dict.fromkeys(dict(c)[axis] for c in cells if axis in dict(c))) for axis in axes}
    left_out: list[str] = []
    while cells and len(cells) < math.prod(map(len, levels.values())):
        counts = {(a, v): sum((a, v) in c for c in cells) * len(levels[a]) for a in axes for v in levels[a]}
        axis, value = min(counts, key=lambda each: counts[each])
        left_out.append(value)
        levels[axis].remove(value)
        cells = {coords: score for coords, score in cells.items() if (axis, value) not in coords}
    axes = [axis for axis in axes if len(levels[axis]) > 1]
    if len(axes) < 2 or not cells:
        return None
    order = [dict(zip(levels, chosen, strict=True)) for chosen in itertools.product(*levels.values())]
    scores = np.array([cells[tuple(sorted(coords.items()))] for coords in order], dtype=float)
    scores = scores.reshape([len(levels[axis]) for axis in axes])
    total = float(((scores - scores.mean()) ** 2).sum())
    if not total:
        return None
    means = {axis: scores.mean(axis=tuple(j for j in range(len(axes)) if j != i), keepdims=True) - scores.mean()
             for i, axis in enumerate(axes)}  # fmt: skip
    found = []
    for i, axis in enumerate(axes):
        table = np.moveaxis(scores, i, 0).reshape(len(levels[axis]), -1)
        decided = len(table) > 2 and table.shape[1] > 1 and bool((table != table[0]).any())
        p = float(friedmanchisquare(*table).pvalue) if decided else None
        share = float((means[axis] ** 2).sum()) * scores.size / len(table) / total
        found.append({"name": axis, "levels": len(table), "share": share, "friedman_p": p})
    pairs = []
    for (i, a), (j, b) in itertools.combinations(enumerate(axes), 2):
        both = scores.mean(axis=tuple(k for k in range(len(axes)) if k not in (i, j)), keepdims=True)
        part = both - scores.mean() - means[a] - means[b]
        pairs.append({"name": f"{a} x {b}", "share": float((part**2).sum()) * scores.size / part.size / total})
    rest = 1 - sum(each["share"] for each in [*found, *pairs])
    return {"axes": found, "pairs": pairs, "rest": max(0.0, rest), "cells": scores.size, "left_out": left_out}


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


def judge(a: dict[str, object], b: dict[str, Any], lower: bool) -> dict[str, Any]:
    """One figure by Welch's t-interval of the difference of two means.

    Args:
        a, b: `summary`.
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


def read_results(folder: Path | str) -> Json:
    """`results.json` of a sweep."""
    return read_json(Path(folder) / "results.json", kind=KIND, schema=SCHEMA)


def _networks(folder: Path) -> tuple[dict[str, dict[str, Any]], str, list[str]]:
    """Name -> {figure: summary}, the figure that networks are judged by, and the classes."""
    if (folder / "results.json").is_file():
        table = read_results(folder)
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
