"""What a sweep found out: results.json, the master table, and what MLflow shows of it.

Means over seeds have intervals, and criteria are ranked over blocks with significance.
"""

from __future__ import annotations

import csv
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vss.core import yaml12
from vss.core.files import atomic, read_json, write_json
from vss.run import tracking
from vss.run.page.sweep import OTHER_MACS
from vss.run.tracking import Tracked
from vss.sweep.experiment import Json
from vss.sweep.folds import over_folds
from vss.sweep.grid import REPEATS, Trial
from vss.sweep.store import Store

KIND, SCHEMA = "vss.sweep_results", 1
COSTS = ("macs_g", "params_m", "latency_ms_p50", "size_mib")
EQUAL = 0.02
"""MACs of trials at one budget that differ by more than this fraction are not equal."""
FIRST = (
    "params_m", "macs_g", "miou_pct", "ap_pct", "recall_pct", "f1_pct", "fnr_pct", "latency_ms_p50", "fps", "speedup",
    "ships",
)  # fmt: skip
"""Figures of the master table, where a sweep has them."""
LEVEL = 0.95


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
        `rows` [{"name", "rank", "mean", "wins", "gap": mean difference to the best, "p": corrected, or None}], best
        first; `blocks` used; `friedman_p` or None; `least_p`: the smallest p that so many blocks can give.
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
    pairs = {name: [a - b for a, b in zip(scores[order[0]], scores[name], strict=True)] for name in order[1:]}
    corrected = holm({name: float(wilcoxon(gaps).pvalue) if any(gaps) else 1.0 for name, gaps in pairs.items()})
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
    import itertools

    import numpy as np
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


def gather(store: Store) -> Json:
    """Everything a sweep found out.

    Returns:
        JSON of kind `vss.sweep_results`: `metric`, `title`, `columns` (keys of `values` in table order), `axes`,
        `rows` (a trial each), `groups` (trials that differ in seed or fold alone, each value with its interval),
        `baselines`, `ranking`, `effects`, `unequal` (budgets whose trials do not cost the same), `over_folds` (see
        `vss.sweep.folds`), and how it was made.
    """
    trials = store.trials()
    stages = {trial.id: store.stage_of(trial) for trial in trials if not trial.fault}
    shared = {name: found for name in dict.fromkeys(stages.values()) if (found := store.shared(name))}
    first: Json = next(iter(shared.values()), {})
    metric = store.grid.metric or first.get("metric") or store.experiment().metric
    rows = [_row(store, trial, stages.get(trial.id)) for trial in trials]
    good = [row for row in rows if row["status"] == "ok"]
    unequal = _unequal(good)
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
        "baselines": _baselines(trials, stages, _with_times(shared, good)),
        "classes": first.get("classes", []),
        "ranking": ranking(_blocks(good, metric)),
        "effects": effects(good, metric),
        "unequal": unequal,
        "over_folds": over_folds(store, trials, {row["id"] for row in good}),
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


def _row(store: Store, trial: Trial, stage: str | None) -> Json:
    record = store.record(trial.id) or {"status": "left"}
    kept = ("status", "error", "seconds", "attempts", "iou_pct", "groups", "labels", "stage")
    row = {"id": trial.id, "coords": trial.coords, "share": stage, "values": record.get("row", {})}
    row |= {key: record[key] for key in kept if record.get(key) is not None}
    if "speedup" in row["values"] and "macs_kept" in row["values"]:
        values = row["values"]
        row["values"] = values | {"speedup_per_mac_reduction": values["speedup"] * values["macs_kept"]}
    return row | {"command": _command(store, trial)}


def _command(store: Store, trial: Trial) -> str:
    """One run of this trial by itself, training included; its recipe is written for that."""
    if trial.fault or store.grid.study != "prune":
        return ""
    path = store.root / "recipes" / f"{trial.id}.yaml"
    text = yaml12.dump(trial.recipe().model_dump(mode="json"))
    if not path.is_file() or path.read_text() != text:
        with atomic(path) as temporary:
            temporary.write_text(text)
    return shlex.join(["vss", "run", f"recipes/{trial.id}.yaml", "--out", f"again/{trial.id}"])


def _columns(rows: list[Json], metric: str, scores: list[str]) -> list[str]:
    wanted = [metric, f"{metric}_change", *scores, *COSTS, "macs_kept", "params_kept", f"pruned_{metric}", "speedup"]
    wanted.append("speedup_per_mac_reduction")
    keys = {key for row in rows for key, value in row["values"].items() if isinstance(value, int | float)}
    first = [key for key in dict.fromkeys(wanted) if key in keys]
    return first + sorted(keys - set(first))


def _groups(rows: list[Json]) -> list[Json]:
    """Trials that differ in seed or fold alone, together."""
    table: dict[str, list[Json]] = {}
    for row in rows:
        table.setdefault(" · ".join(v for axis, v in row["coords"].items() if axis not in REPEATS), []).append(row)
    return [
        {
            "name": name,
            "coords": {axis: value for axis, value in members[0]["coords"].items() if axis not in REPEATS},
            "cells": [row["id"] for row in members],
            **_over_seeds([row["values"] for row in members], [row.get("iou_pct") for row in members]),
            "widths": members[0].get("groups", []),
            "labels": sorted({label for row in members for label in row.get("labels", [])}),
        }
        for name, members in table.items()
    ]


def _over_seeds(rows: list[Json], ious: list[list[float | None] | None]) -> Json:
    """`values`: the summary of every figure that is a number; `iou_pct`: means per class."""
    keys = dict.fromkeys(key for row in rows for key in row)
    numbers = {key: [v for row in rows if isinstance(v := row.get(key), int | float)] for key in keys}
    columns = [[v for v in column if v is not None] for column in zip(*filter(None, ious), strict=True)]
    return {
        "values": {key: summary(found) for key, found in numbers.items() if found},
        "iou_pct": [sum(column) / len(column) if column else None for column in columns],
    }


def _with_times(shared: dict[str, Json], rows: list[Json]) -> dict[str, Json]:
    """Stages whose row has the network's own latency: the median of those measured interleaved with its trials."""
    found = {}
    for name, stage in shared.items():
        own = [row["values"].get("baseline_latency_ms_p50") for row in rows if row["share"] == name]
        times = [ms for ms in own if ms is not None]
        row = stage["row"] | ({"latency_ms_p50": statistics.median(times)} if times else {})
        found[name] = stage | {"row": row}
    return found


def _baselines(trials: list[Trial], stages: dict[str, str], shared: dict[str, Json]) -> list[Json]:
    """The networks before pruning, means over seeds."""
    table: dict[str, dict[str, Json]] = {}
    for trial in trials:
        name = stages.get(trial.id)
        if name in shared:
            table.setdefault(trial.coords.get("network", "baseline"), {})[name] = shared[name]
    return [
        {"name": name, **_over_seeds([s["row"] for s in own.values()], [s.get("iou_pct") for s in own.values()])}
        for name, own in table.items()
    ]


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
    """Budgets of a network whose trials differ by more than EQUAL in MACs. Each trial that lies so far from the median
    of its budget is labelled, and with it every mean over seeds that holds it."""
    table: dict[str, list[Json]] = {}
    for row in rows:
        if "macs_kept" in row["values"] and row["coords"].get("budget", "macs").startswith("macs"):
            key = " · ".join(row["coords"][axis] for axis in ("network", "budget") if axis in row["coords"])
            table.setdefault(key, []).append(row)
    found = []
    for name, members in table.items():
        kept = {row["id"]: row["values"]["macs_kept"] for row in members}
        low, high = min(kept, key=lambda i: kept[i]), max(kept, key=lambda i: kept[i])
        if kept[high] > (1 + EQUAL) * kept[low]:
            found.append({"name": name, "low": low, "low_kept": kept[low], "high": high, "high_kept": kept[high]})
        middle = statistics.median(kept.values())
        for row in members:
            if abs(off := kept[row["id"]] / middle - 1) > EQUAL:
                row["labels"] = [*row.get("labels", []), f"{OTHER_MACS}: {100 * off:+.1f} % from the median"]
    return found


def _panels(store: Store) -> Json:
    file = store.root / "panels.json"
    data = read_json(file, kind="vss.sweep_panels", schema=1) if file.is_file() else {"panels": [], "palette": []}
    return {key: data[key] for key in ("panels", "palette")}


def write_csv(results: Mapping[str, Any], path: Path) -> Path:
    """One line for every baseline and every group of trials that differ in seed or fold alone.

    Columns: `name`, the axes, `sparsity_pct` (parameters that went), then `FIRST` and every other figure, each a mean
    and, with two seeds or more, the half-width of its 95 % interval (`KEY_half`); at last `labels`, such as that a mean
    holds a run of other MACs, where there are any.
    """
    rows = table(results)
    axes = [axis for axis in results["axes"] if axis not in REPEATS]
    columns = sorted(results["columns"], key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    halves = [key for key in columns if any(f"{key}_half" in row for row in rows)]
    heads = ["name", *axes, "seeds", "sparsity_pct"]
    heads += [name for key in columns for name in ([key, f"{key}_half"] if key in halves else [key])]
    heads += ["labels"] if any(row["labels"] for row in rows) else []
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, heads, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the master table, baselines first; a figure that nothing defines is absent."""
    rows = []
    for kind in ("baselines", "groups"):
        for group in results[kind]:
            values = group["values"]
            row: dict[str, Any] = {"name": group["name"], "kind": kind, **group.get("coords", {})}
            row["labels"] = "; ".join(group.get("labels", []))
            row["seeds"] = max((value["n"] for value in values.values()), default=0)
            row |= {key: value["mean"] for key, value in values.items()}
            row |= {f"{key}_half": value["half"] for key, value in values.items() if value["half"] is not None}
            row["sparsity_pct"] = 100 * (1 - row["params_kept"]) if "params_kept" in row else 0.0
            rows.append(row)
    return rows


def to_mlflow(store: Store, table: Json) -> None:
    """Write every trial that is done as a run into `mlruns` below the sweep's folder."""
    done = [row for row in table["rows"] if row["status"] == "ok"]
    numbers = [{key: v for key, v in row["values"].items() if isinstance(v, int | float)} for row in done]
    runs = [Tracked(row["id"], row["coords"], each) for row, each in zip(done, numbers, strict=True)]
    tracking.to_mlflow(store.root / "mlruns", table["name"], runs)
