"""What a sweep found out: results.json, the master table, and what MLflow shows of it.

Means over seeds have intervals, and criteria are ranked over blocks with significance.
"""

from __future__ import annotations

import csv
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vss.core import yaml12
from vss.core.files import atomic, read_json, write_json, write_text
from vss.run import tracking
from vss.run.page.sweep import KIND, OTHER_MACS, SCHEMA
from vss.run.tracking import Tracked
from vss.sweep.compare import effects, ranking, summary
from vss.sweep.experiment import Json, TrialDirs
from vss.sweep.grid import REPEATS, Trial
from vss.sweep.store import Store

COSTS = ("macs_g", "params_m", "latency_ms_p50", "size_mib")
EQUAL = 0.02
"""MACs of trials at one budget that differ by more than this fraction are not equal."""
FIRST = (
    "params_m", "macs_g", "miou_pct", "ap_pct", "recall_pct", "f1_pct", "fnr_pct", "latency_ms_p50", "fps", "speedup",
    "ships",
)  # fmt: skip
"""Figures of the master table, where a sweep has them."""


def gather(store: Store) -> Json:
    """Everything a sweep found out.

    Returns:
        JSON of kind `vss.sweep_results`: `metric`, `title`, `columns` (keys of `values` in table order), `axes`,
        `rows` (a trial each), `groups` (trials that differ in seed or fold alone, each value with its interval),
        `baselines`, `ranking`, `effects`, `unequal` (budgets whose trials do not cost the same), `over_folds` (see
        the function), and how it was made.
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
    return write_json(store.root / "results.json", gather(store))


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
        write_text(path, text)
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


def over_folds(store: Store, trials: Sequence[Trial], done: set[str]) -> list[Json]:
    """One entry a network and seed that was cross-validated.

    Args:
        store: the sweep.
        trials: all of its trials.
        done: ids of those that are done.

    Returns:
        {"name", "seed", "folds"}, and `rows` and `checks` of `vss.train.tasks.base.Task.over_folds`; or `missing`: the
        folds without a trial that is done, in place of both.
    """
    table: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        if "fold" in trial.coords and not trial.fault:
            name = " · ".join(v for axis, v in trial.coords.items() if axis not in REPEATS)
            table.setdefault((name, trial.coords.get("seed", "")), []).append(trial)
    found = []
    for (name, seed), members in table.items():
        folds = {str(trial.recipe().data.fold): trial for trial in members}
        counts = {fold.partition("/")[2] for fold in folds}
        wanted = {f"{number}/{count}" for count in counts for number in range(1, int(count) + 1)}
        missing = sorted(wanted - {fold for fold, trial in folds.items() if trial.id in done})
        entry: Json = {"name": name, "seed": seed, "folds": len(wanted)}
        if missing:
            found.append(entry | {"missing": missing})
            continue
        places = [
            (
                each.recipe(),
                TrialDirs(store.folder(each.id), store.root / "shared" / store.stage_of(each), lambda *_: None),
            )
            for _, each in sorted(folds.items())
        ]
        said = store.experiment().over_folds(places)
        if said is not None:
            found.append(entry | said)
    return found
