"""Figures over seeds and blocks: means with intervals, ranks of criteria with significance."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vss.core import yaml12
from vss.core.files import atomic, read_json, write_json
from vss.sweep.grid import Cell
from vss.sweep.store import Store
from vss.sweep.study import Json

LEVEL = 0.95


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and half-width of the 95 % t-interval of the mean; the latter two need two values."""
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"n": count, "mean": mean, "sd": None, "half": None}
    sd = statistics.stdev(values)
    return {
        "n": count,
        "mean": mean,
        "sd": sd,
        "half": float(t.ppf((1 + LEVEL) / 2, count - 1)) * sd / math.sqrt(count),
    }


def ranking(blocks: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Criteria ranked within blocks (one network, budget and seed each) and compared with the best.

    Ranks as in Demsar (2006): 1 is best, ties share their mean rank; the Friedman test asks whether criteria differ at
    all, the Wilcoxon signed-rank test whether one differs from the best, corrected after Holm.

    Args:
        blocks: block -> {criterion: score, higher is better}; blocks that lack a criterion are left out.

    Returns:
        `rows` [{"name", "rank", "mean", "wins", "gap": mean difference to the best, "p": corrected, or None}], best
        first; `blocks` used; `friedman_p` or None; `least_p`: the smallest p that so many blocks can give.
    """
    from scipy.stats import friedmanchisquare, rankdata

    names = list(dict.fromkeys(name for block in blocks.values() for name in block))
    whole = [block for block in blocks.values() if all(name in block for name in names)]
    if not whole or len(names) < 2:
        return {"rows": [], "blocks": len(whole), "friedman_p": None, "least_p": None}
    table = [[block[name] for name in names] for block in whole]
    ranks = [rankdata([-value for value in row]) for row in table]
    mean_rank = {name: sum(float(row[i]) for row in ranks) / len(ranks) for i, name in enumerate(names)}
    scores = {name: [row[i] for row in table] for i, name in enumerate(names)}
    order = sorted(names, key=lambda name: (mean_rank[name], -statistics.fmean(scores[name])))
    raw = {name: _wilcoxon(scores[order[0]], scores[name]) for name in order[1:]}
    corrected = holm(raw)
    rows = [
        {
            "name": name,
            "rank": mean_rank[name],
            "mean": statistics.fmean(scores[name]),
            "wins": sum(block[name] == max(block[other] for other in names) for block in whole),
            "gap": statistics.fmean(scores[name]) - statistics.fmean(scores[order[0]]),
            "p": corrected.get(name),
        }
        for name in order
    ]
    friedman = None
    if len(names) > 2 and len(whole) > 1 and any(len(set(row)) > 1 for row in table):
        friedman = float(friedmanchisquare(*scores.values()).pvalue)
    return {"rows": rows, "blocks": len(whole), "friedman_p": friedman, "least_p": min(1.0, 2.0 ** (1 - len(whole)))}


def _wilcoxon(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the signed-rank test; 1 where all pairs are equal."""
    from scipy.stats import wilcoxon

    differences = [x - y for x, y in zip(a, b, strict=True)]
    return float(wilcoxon(differences).pvalue) if any(differences) else 1.0


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


# From the records of a sweep to one table: results.json, which the page, exports and `vss compare` read.


KIND, SCHEMA = "vss.sweep_results", 1
COSTS = ("macs_g", "params_m", "latency_ms_p50", "size_mib")
EQUAL = 0.02
"""MACs of cells at one budget that differ by more than this fraction of the whole are not equal."""


def gather(store: Store) -> Json:
    """Everything a sweep found out.

    Returns:
        JSON of kind `vss.sweep_results`: `metric`, `title`, `columns` (keys of `values` in table order), `axes`,
        `rows` (a cell each), `groups` (cells that differ in the seed alone, each value with its interval),
        `baselines`, `ranking`, `unequal` (budgets whose cells do not cost the same), and how it was made.
    """
    cells = store.cells()
    shares = {cell.id: store.share(cell) for cell in cells if not cell.fault}
    shared = {name: part for name in dict.fromkeys(shares.values()) if (part := store.shared(name))}
    first: Json = next(iter(shared.values()), {})
    metric = store.grid.metric or first.get("metric") or store.study().metric
    rows = [_row(store, cell, shares.get(cell.id)) for cell in cells]
    good = [row for row in rows if row["status"] == "ok"]
    about = store.about()
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "name": store.grid.name,
        "created": about["created"],
        "command": about["command"],
        "environment": about["environment"],
        "protocol": first.get("protocol", ""),
        "metric": metric,
        "title": first.get("title", metric),
        "columns": _columns(good, metric, first.get("row_keys", [])),
        "axes": list(dict.fromkeys(axis for row in rows for axis in row["coords"])),
        "rows": rows,
        "groups": _groups(good),
        "baselines": _baselines(cells, shares, _with_times(shared, good)),
        "classes": first.get("classes", []),
        "ranking": ranking(_blocks(good, metric)),
        "unequal": _unequal(good),
        "computed_steps": len(store.computed()),
        "repeated_steps": len(store.repeated()),
        **_panels(store),
    }


def write(store: Store) -> Path:
    """Gather and write `results.json`."""
    return write_json(store.root / "results.json", gather(store))


def read(folder: Path | str) -> Json:
    """`results.json` of a sweep."""
    return read_json(Path(folder) / "results.json", kind=KIND, schema=SCHEMA)


def _row(store: Store, cell: Cell, share: str | None) -> Json:
    record = store.record(cell.id) or {"status": "left"}
    kept = ("status", "error", "seconds", "attempts", "iou_pct", "groups", "labels", "stage")
    row = {"id": cell.id, "coords": cell.coords, "share": share, "values": record.get("row", {})}
    row |= {key: record[key] for key in kept if record.get(key) is not None}
    if "speedup" in row["values"] and "macs_kept" in row["values"]:
        values = row["values"]
        row["values"] = values | {"speedup_per_mac_reduction": values["speedup"] * values["macs_kept"]}
    return row | {"command": _command(store, cell)}


def _command(store: Store, cell: Cell) -> str:
    """One run of this cell by itself, training included; its recipe is written for that."""
    if cell.fault or store.grid.study != "prune":
        return ""
    path = store.root / "recipes" / f"{cell.id}.yaml"
    text = yaml12.dump(cell.recipe().model_dump(mode="json"))
    if not path.is_file() or path.read_text() != text:
        with atomic(path) as temporary:
            temporary.write_text(text)
    return shlex.join(["vss", "run", f"recipes/{cell.id}.yaml", "--out", f"again/{cell.id}"])


def _columns(rows: list[Json], metric: str, scores: list[str]) -> list[str]:
    wanted = [metric, f"{metric}_change", *scores, *COSTS, "macs_kept", "params_kept", f"pruned_{metric}", "speedup"]
    wanted.append("speedup_per_mac_reduction")
    keys = {key for row in rows for key, value in row["values"].items() if isinstance(value, int | float)}
    first = [key for key in dict.fromkeys(wanted) if key in keys]
    return first + sorted(keys - set(first))


def _groups(rows: list[Json]) -> list[Json]:
    """Cells that differ in the seed alone, together."""
    table: dict[str, list[Json]] = {}
    for row in rows:
        table.setdefault(" · ".join(v for axis, v in row["coords"].items() if axis != "seed"), []).append(row)
    groups = []
    for name, members in table.items():
        keys = dict.fromkeys(key for row in members for key in row["values"])
        values = {key: [v for row in members if isinstance(v := row["values"].get(key), int | float)] for key in keys}
        groups.append({
            "name": name,
            "coords": {axis: value for axis, value in members[0]["coords"].items() if axis != "seed"},
            "cells": [row["id"] for row in members],
            "values": {key: summary(found) for key, found in values.items() if found},
            "iou_pct": _mean_lists([row["iou_pct"] for row in members if row.get("iou_pct")]),
            "widths": members[0].get("groups", []),
            "labels": sorted({label for row in members for label in row.get("labels", [])}),
        })  # fmt: skip
    return groups


def _mean_lists(lists: list[list[float | None]]) -> list[float | None]:
    columns = [[value for value in column if value is not None] for column in zip(*lists, strict=True)]
    return [sum(column) / len(column) if column else None for column in columns]


def _with_times(shared: dict[str, Json], rows: list[Json]) -> dict[str, Json]:
    """Shared parts whose row has the network's own latency: the median of those measured in turns with its cells."""
    found = {}
    for name, part in shared.items():
        own = [row["values"].get("baseline_latency_ms_p50") for row in rows if row["share"] == name]
        times = [ms for ms in own if ms is not None]
        found[name] = part | ({"row": part["row"] | {"latency_ms_p50": median(times)}} if times else {})
    return found


def _baselines(cells: list[Cell], shares: dict[str, str], shared: dict[str, Json]) -> list[Json]:
    """The networks before pruning, means over seeds."""
    table: dict[str, dict[str, Json]] = {}
    for cell in cells:
        if shares.get(cell.id) in shared:
            name = shares[cell.id]
            table.setdefault(cell.coords.get("network", "baseline"), {})[name] = shared[name]
    found = []
    for name, parts in table.items():
        keys = dict.fromkeys(key for part in parts.values() for key in part["row"])
        values = {key: [part["row"][key] for part in parts.values() if key in part["row"]] for key in keys}
        iou = [part["iou_pct"] for part in parts.values() if part.get("iou_pct")]
        numbers = {k: [v for v in found if isinstance(v, int | float)] for k, found in values.items()}
        found.append({
            "name": name, "values": {k: summary(v) for k, v in numbers.items() if v}, "iou_pct": _mean_lists(iou),
        })  # fmt: skip
    return found


def _blocks(rows: list[Json], metric: str) -> dict[str, dict[str, float]]:
    """Everything but the criterion -> {criterion: score}; without criteria, variants are compared."""
    axis = "criterion" if any("criterion" in row["coords"] for row in rows) else "variant"
    blocks: dict[str, dict[str, float]] = {}
    for row in rows:
        score, name = row["values"].get(metric), row["coords"].get(axis)
        if score is not None and name is not None:
            block = " · ".join(value for key, value in row["coords"].items() if key != axis)
            blocks.setdefault(block, {})[name] = score
    return blocks


def _unequal(rows: list[Json]) -> list[Json]:
    """Budgets of a network at which the kept share of MACs differs by more than EQUAL between cells."""
    table: dict[str, list[Json]] = {}
    for row in rows:
        if "macs_kept" in row["values"] and row["coords"].get("budget", "macs").startswith("macs"):
            key = " · ".join(row["coords"][axis] for axis in ("network", "budget") if axis in row["coords"])
            table.setdefault(key, []).append(row)
    found = []
    for name, members in table.items():
        kept = {row["id"]: row["values"]["macs_kept"] for row in members}
        low, high = min(kept, key=lambda i: kept[i]), max(kept, key=lambda i: kept[i])
        if kept[high] - kept[low] > EQUAL:
            found.append({"name": name, "low": low, "low_kept": kept[low], "high": high, "high_kept": kept[high]})
    return found


def _panels(store: Store) -> Json:
    file = store.root / "panels.json"
    data = read_json(file, kind="vss.sweep_panels", schema=1) if file.is_file() else {"panels": [], "palette": []}
    return {key: data[key] for key in ("panels", "palette")}
