"""Which classes and which images: tables with the worst first, the confusion before and after, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.files import read_json
from vss.run.page.verdict import gates, within
from vss.run.page.words import TIMES, css, label, number, show, signed, title

FIRST, LAST = "baseline", "engine pruned"
MOST = 24
"""Classes of a confusion matrix; the others become one."""
OTHERS = "others"


def kind_of(name: str) -> str:
    """The colour role of a row: baseline, pruned, finetuned, engine, control or other."""
    if name == "engine baseline":
        return "engine-baseline"
    if name in {"baseline", "pruned", "finetuned", "control"}:
        return name
    return "engine" if "engine" in name else "other"


def classes(report: Mapping[str, Any]) -> dict[str, object] | None:
    """IoU of every class, what lost most first; `spans` are 95 % intervals of the change from the first network."""
    scores = report.get("iou_pct", {})
    order = [FIRST, "control", "finetuned" if LAST not in scores else LAST]
    names = [name for name in order if name in scores] or list(scores)
    if not names:
        return None
    palette, drops = report.get("palette") or [], report.get("class_drops", {})
    matrix = np.array(report.get("confusion", {}).get(names[-1], []), np.int64)
    rows = []
    for index, name in enumerate(report["classes"]):
        values = [(row, kind_of(row), scores[row][index]) for row in names]
        first, last = values[0][2], values[-1][2]
        change = last - first if len(names) > 1 and None not in (first, last) else None
        span = drops[names[0]][index] if names[0] in drops and change is not None else None
        found = {"drop_interval": span} if span else {}
        rows.append(
            {
                "name": name,
                "colour": css(palette[index]) if index < len(palette) else "",
                "values": values,
                "change": change,
                "span": f"{signed(-span[1], 1)} to {signed(-span[0], 1)}" if span else "",
                "low": -span[1] if span else None,
                "noise": within(found),
                "share": 100 * float(matrix[index].sum() / matrix.sum()) if matrix.size and matrix.sum() else None,
                "taken": _taken(matrix, index, report["classes"]),
            }
        )
    rows.sort(key=lambda row: (row["change"] is None, row["change"] or 0.0, row["values"][-1][2] or 0.0))
    spans, shares = (any(row[key] not in ("", None) for row in rows) for key in ("span", "share"))
    series = [(title(name), kind_of(name)) for name in names]
    return {"series": series, "rows": rows, "spans": spans, "shares": shares, "changes": len(names) > 1,
            "sentence": _lost(rows, series[0][0])}  # fmt: skip


def _taken(matrix: np.ndarray, index: int, names: Sequence[str]) -> str:
    """What the pixels of a class are mistaken for most, and how many of them."""
    if not matrix.size or not matrix[index].sum():
        return ""
    wrong = matrix[index].copy()
    wrong[index] = 0
    share = 100 * wrong.max() / matrix[index].sum()
    return f"{names[int(wrong.argmax())]}, {number(share, 0)} %" if share >= 0.5 else ""


def _lost(rows: Sequence[Mapping[str, Any]], first: str) -> str:
    judged = [row for row in rows if row["noise"]]
    if not judged:
        return ""
    lost = [f"{row['name']} ({signed(row['change'], 1)})" for row in judged if row["noise"] == "a loss beyond noise"]
    if not lost:
        return f"No class lost beyond noise against the {first} network."
    return f"Lost beyond noise against the {first} network: {', '.join(lost)}."


def confusion(report: Mapping[str, Any]) -> dict[str, object] | None:
    """Matrices in percent of the true class, before and after; classes with the lowest IoU after come first."""
    matrices = {n: np.array(m, np.int64) for n, m in report.get("confusion", {}).items() if n in (FIRST, LAST)}
    names = report.get("classes", [])
    if not matrices or len(names) < 2:
        return None
    last = list(matrices.values())[-1]
    unions = last.sum(0) + last.sum(1) - last.diagonal()
    iou = np.divide(last.diagonal(), unions, out=np.full(len(names), 2.0), where=unions > 0)
    order = np.argsort(iou, kind="stable")
    kept, rest = (order, order[:0]) if len(order) <= MOST else (order[: MOST - 1], order[MOST - 1 :])
    heads = [names[i] for i in kept] + [OTHERS] * bool(len(rest))
    tables = []
    for name, matrix in matrices.items():
        merged = _merged(matrix, kept, rest)
        totals = merged.sum(1, keepdims=True)
        shares = np.divide(100 * merged, totals, out=np.zeros(merged.shape), where=totals > 0)
        body = [
            (heads[i], [(float(v), number(v, 0) if v >= 0.5 else "", i == j) for j, v in enumerate(row)])
            for i, row in enumerate(shares)
        ]
        tables.append({"title": title(name), "body": body})
    return {"heads": heads, "tables": tables, "others": len(rest)}


def _merged(matrix: np.ndarray, kept: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The classes `kept` in their order, all of `rest` as one behind them."""
    groups = [[i] for i in kept] + ([list(rest)] if len(rest) else [])
    pick = np.zeros((len(groups), len(matrix)), np.int64)
    for row, members in enumerate(groups):
        pick[row, members] = 1
    return pick @ matrix @ pick.T


def worst(report: Mapping[str, Any]) -> dict[str, object] | None:
    """The images listed by the report: mean IoU of each network, the change, and what is confused most."""
    listed, names = report.get("worst", []), report.get("classes", [])
    if not listed:
        return None
    heads = list(listed[0]["scores"])
    rows = []
    for each in listed:
        values = [each["scores"].get(name) for name in heads]
        change = values[-1] - values[0] if None not in (values[0], values[-1]) else None
        mixed = each.get("confused")
        told = f"{names[mixed[0]]} taken for {names[mixed[1]]}, {number(mixed[2], 1)} % of the image" if mixed else ""
        rows.append({"id": each["id"], "why": each["why"], "values": values, "change": change, "confused": told})
    return {"heads": [title(name) for name in heads], "rows": rows}


def missing(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(figure, why it is not on the page and what gives it)."""
    if not report.get("rows"):
        return [("All figures", "the run stopped before its end; the same command goes on")] * (
            report.get("status") == "failed"
        )
    names, recipe = {row["name"] for row in report["rows"]}, report.get("recipe", {})
    found: list[tuple[str, str]] = []
    bench = report.get("bench", {})
    if bench.get("noise"):
        found.append(("Latency, speed-up, score at equal latency", bench["noise"]))
    elif not any(row.get("latency_ms_p50") is not None for row in report["rows"]):
        found.append(("Latency and speed-up", "the report has none; a run to its end measures them"))
    noisy = bench.get("precision", {}).get("stable") is False
    if noisy and not bench.get("noise"):
        found.append(
            ("Latency of other precisions and runtimes", "the machine was too noisy; the same command times again")
        )
    if "control" not in names:
        found.append(("Unpruned control, trained as long", "the recipe has control: false; true trains it"))
    for check in report.get("gate", {}).get("checks", []):
        if check.get("what") and check.get("passed", True) is None:
            found.append((f"Verdict on {check['what']}", "the recipe sets no limit; see its section gate"))
    if recipe and not recipe.get("references"):
        found.append(("Small networks that were never pruned", "the recipe names none in references"))
    if recipe.get("panels") == 0:
        found.append(("Pictures", "the recipe has panels: 0"))
    if report.get("iou_pct") and not report.get("worst"):
        found.append(("Confusion, intervals by class, worst images", _OLD))
    if "defects" in report and not report.get("decisions"):
        found.append(("Precision and recall, scores, misses against false alarms", _OLD))
    for name, values in report.get("iou_pct", {}).items():
        absent = [report["classes"][i] for i, value in enumerate(values) if value is None]
        if absent and name in (FIRST, LAST):
            found.append((f"IoU of {', '.join(absent)}, {title(name)}", "in neither truth nor prediction of the split"))
    return found + [(place, reason) for place, reason in report.get("nulls", {}).items()]


_OLD = "an earlier version wrote this report; the same vss run adds them without training anew"


def layers(report: Mapping[str, object], root: Path) -> dict[str, object] | None:
    """What `vss explain` and `vss lut` have left beside the report: files to link, and what they say."""
    if report.get("status") != "ok":
        return None
    links, sentences = [], []
    for path in sorted(root.glob("*.json")):
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(200)
        if '"vss.explain"' in head:
            found = read_json(path, kind="vss.explain", schema=1)
            links.append((path.name, "time per layer"))
            sentences.append(f"{path.name}: {_explained(found)}")
        elif '"vss.latency_table"' in head:
            links.append((path.name, "latency table: time over widths"))
    links += [(path.name, "picture: time over widths, with those kept") for path in sorted(root.glob("*.svg"))]
    return {"links": links, "sentences": sentences} if links else None


def _explained(found: Mapping[str, Any]) -> str:
    if "sentence" in found:  # of engines that did not run
        return str(found["sentence"])
    text = (
        f"{number(found['ms_before'], 2)} ms before and {number(found['ms_after'], 2)} ms after, "
        f"{number(found['speedup'], 2)}{TIMES} for {number(found['mac_reduction'], 2)}{TIMES} fewer MACs."
    )
    causes = [f"{cause['cause']} ({number(cause['lost_ms'], 2)} ms)" for cause in found.get("causes", [])[:3]]
    return f"{text} Most is lost by: {'; '.join(causes)}." if causes else text


def results(report: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]) -> dict[str, object] | None:
    """The main table: `columns` are (key, head, unit), those that any row has; and every figure of every row."""
    rows = report.get("rows", [])
    if not rows:
        return None
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    base: Mapping[str, object] = next((row for row in rows if row["name"] == FIRST), {})
    body = [
        {
            "name": row["name"],
            "title": title(row["name"]),
            "kind": kind_of(row["name"]),
            "labels": row.get("labels", ""),
            "cells": [cell(key, row, base) for key, _, _ in columns],
        }
        for row in rows
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "name"))
    every = [(label(key), [show(row.get(key)) for row in rows]) for key in keys]
    return {"heads": [(head, unit) for _, head, unit in columns], "body": body,
            "names": [row["name"] for row in rows], "every": every, "gated": gates(report) is not None}  # fmt: skip


_SCORES = {"miou_pct", "ap_pct", "fnr_pct", "f1_pct"}
_RELATIVE = {"params_m", "macs_g", "size_mib"}


def cell(key: str, row: Mapping[str, Any], base: Mapping[str, object]) -> dict[str, object]:
    """One figure of the main table and, below it, its change from the baseline."""
    value, start = row.get(key), base.get(key)
    if value is None:
        return {"value": None, "text": "", "delta": "", "tone": ""}
    ratio = key.startswith("speedup")
    text = f"{number(value, 2)}{TIMES}" if key == "speedup" else number(value, 2)
    found = {"value": value, "text": text, "delta": "", "tone": ""}
    if start is None or row is base or ratio:
        return found
    if key in _RELATIVE and start:
        return found | {"delta": f"{signed((value / start - 1) * 100, 0)} %"}
    if key in _SCORES:
        change = value - start
        better = -change if key == "fnr_pct" else change
        tone = "bad" if better < -0.005 else "good" if better > 0.005 else ""
        return found | {"delta": signed(change, 2), "tone": tone}
    return found
