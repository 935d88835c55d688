"""The master table of a sweep as CSV, and its picture: bars of the score and the miss rate, trade-off against MACs."""

from __future__ import annotations

import csv
import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.core.errors import VssError
from vss.core.files import atomic, write_json
from vss.run.page.charts import pareto
from vss.sweep import results
from vss.sweep.drive import Summary, Tell
from vss.sweep.grid import Cell
from vss.sweep.local import Executor
from vss.sweep.store import Store
from vss.sweep.study import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MISSES = "fnr_pct"
LETTERS = 15  # of a title, on an inch
FIRST = (
    "params_m", "macs_g", "miou_pct", "ap_pct", "recall_pct", "f1_pct", "fnr_pct", "latency_ms_p50", "fps", "speedup",
    "ships",
)  # fmt: skip
"""Figures of the master table, where a sweep has them."""
Row = Mapping[str, Any]


def write_csv(results: Mapping[str, Any], path: Path) -> Path:
    """One line for every baseline and every group of cells that differ in the seed alone.

    Columns: `name`, the axes, `sparsity_pct` (parameters that went), then `FIRST` and every other figure, each a mean
    and, with two seeds or more, the half-width of its 95 % interval (`KEY_half`).
    """
    rows = table(results)
    axes = [axis for axis in results["axes"] if axis != "seed"]
    columns = sorted(results["columns"], key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
    halves = [key for key in columns if any(f"{key}_half" in row for row in rows)]
    heads = ["name", *axes, "seeds", "sparsity_pct"]
    heads += [name for key in columns for name in ([key, f"{key}_half"] if key in halves else [key])]
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
            row["seeds"] = max((value["n"] for value in values.values()), default=0)
            row |= {key: value["mean"] for key, value in values.items()}
            row |= {f"{key}_half": value["half"] for key, value in values.items() if value["half"] is not None}
            row["sparsity_pct"] = 100 * (1 - row["params_kept"]) if "params_kept" in row else 0.0
            rows.append(row)
    return rows


def write_chart(results: Mapping[str, Any], path: Path) -> Path | None:
    """The picture as PNG; None where no cell is done."""
    rows, metric, title = table(results), results["metric"], results["title"]
    rows = [row for row in rows if row.get(metric) is not None]
    if not any(row["kind"] == "groups" for row in rows):
        return None
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VssError("the picture of a sweep needs matplotlib: pip install matplotlib.") from error
    misses = any(row.get(MISSES) is not None for row in rows)
    with rc_context({"text.parse_math": False}):  # names hold $ as they like
        figure = Figure(figsize=(max(8.0, 0.5 * len(rows)), 8.0), dpi=150, layout="constrained")
        upper, lower = figure.subplots(2, 1)
        bars(upper, rows, [(metric, title)] + ([(MISSES, "missed defects")] if misses else []))
        trade_off(lower, rows, metric, title)
        about = f"{results['name']}: {results['protocol'].split(';')[0]}"
        figure.suptitle(textwrap.fill(about, int(LETTERS * figure.get_figwidth())), fontsize=8)
        with atomic(path) as temporary:
            FigureCanvasAgg(figure).print_png(str(temporary))
    return path


def bars(axes: Axes, rows: Sequence[Row], series: Sequence[tuple[str, str]]) -> None:
    """Bars of one or two figures in percent, with 95 % intervals over seeds."""
    width = 0.8 / len(series)
    for number, (key, name) in enumerate(series):
        places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(rows))]
        heights = [row.get(key) or 0.0 for row in rows]
        halves = [row.get(f"{key}_half") or 0.0 for row in rows]
        axes.bar(places, heights, width, yerr=halves if any(halves) else None, capsize=2, label=name)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("%")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, ncols=len(series), fontsize=8)


def trade_off(axes: Axes, rows: Sequence[Row], metric: str, title: str) -> None:
    """Score against MACs, methods by colour, the front that nothing beats as a line."""
    from matplotlib import colormaps

    known = [row for row in rows if row.get("macs_g") is not None]
    names = list(dict.fromkeys(_method(row) for row in known))
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    for name in names:
        own = [row for row in known if _method(row) == name]
        axes.plot([row["macs_g"] for row in own], [row[metric] for row in own], "o", markersize=5, label=name)
    front = [known[index] for index in pareto([(row["macs_g"], row[metric]) for row in known])]
    axes.plot(
        [row["macs_g"] for row in front], [row[metric] for row in front], "-", color="0.5", linewidth=1, zorder=0,
        label="not beaten",
    )  # fmt: skip
    axes.set_xlabel("GMAC")
    axes.set_ylabel(f"{title} (%)")
    axes.legend(frameon=False, ncols=4, fontsize=7)


def _method(row: Row) -> str:
    return str(row.get("criterion") or row.get("variant") or row["name"])


# Where sweeps are followed: TensorBoard always, MLflow (its local file store) by option.


def to_tensorboard(folder: Path, row: Json) -> None:
    """The figures of a cell as scalars in `folder/tensorboard`, beside the curves of its fits; older ones go."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for key, value in row.items():
            if isinstance(value, int | float):
                writer.add_scalar(f"cell/{key}", value)


def to_mlflow(store: Store, table: Json) -> None:
    """Write runs into `mlruns` below the sweep's folder; a cell that is there with the same figures is left alone."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ModuleNotFoundError as error:
        raise VssError("--mlflow needs MLflow; install it with: pip install 'vss[mlflow]'") from error
    client = MlflowClient(tracking_uri=(store.root / "mlruns").resolve().as_uri())
    found = client.get_experiment_by_name(table["name"])
    experiment = found.experiment_id if found else client.create_experiment(table["name"])
    known = {run.data.tags.get("vss.cell"): run for run in client.search_runs([experiment], max_results=10_000)}
    for row in table["rows"]:
        metrics = {key: float(value) for key, value in row["values"].items() if isinstance(value, int | float)}
        old = known.get(row["id"])
        if row["status"] != "ok" or (old is not None and old.data.metrics == metrics):
            continue
        if old is not None:
            client.delete_run(old.info.run_id)
        run = client.create_run(experiment, run_name=row["id"], tags={"vss.cell": row["id"]})
        for axis, value in row["coords"].items():
            client.log_param(run.info.run_id, axis, value)
        for key, value in metrics.items():
            client.log_metric(run.info.run_id, key, value)
        client.set_terminated(run.info.run_id)


# What follows when all trials are done: latencies, pictures, the table, TensorBoard, MLflow, the page.


PICTURED = 6
"""Criteria (or variants) of one network that the pictures show."""


def finish(store: Store, executor: Executor, summary: Summary, *, tell: Tell, mlflow: bool = False) -> Path:
    """Do all of it; returns the page. What could not be done is told and named in `summary.unmeasured`."""
    from vss.run.page.sweep import write_page

    study = store.study()
    if study.times and store.grid.latency_seconds:
        measure(store, executor, summary, tell)
    if study.times and store.grid.panels:
        picture(store, executor, summary, tell)
    table = results.write(store)
    write_csv(results.read(store.root), store.root / "table.csv")
    write_chart(results.read(store.root), store.root / "chart.png")
    if mlflow:
        pass

        to_mlflow(store, results.read(store.root))
    return write_page(table, store.root / "report.html")


def measure(store: Store, executor: Executor, summary: Summary, tell: Tell) -> None:
    """Latency of every cell's network against its baseline, one cell after another; known ones are kept."""
    for cell in _done(store):
        record = store.record(cell.id)
        if record is None or "latency_ms_p50" in record["row"]:
            continue
        extra = {"seconds": store.grid.latency_seconds}
        outcome = _one(executor, _task(store, executor, "time", cell, extra))
        if outcome["status"] != "ok":
            summary.unmeasured[cell.id] = f"its latency could not be measured: {outcome['error']}"
            tell("failed", cell.id, summary.unmeasured[cell.id])
            continue
        record["row"].pop("latency_spread_pct", None)
        record["row"] |= outcome["result"]
        store.keep(cell, record["key"], {k: v for k, v in record.items() if k not in _HEAD})
        tell("ok", cell.id, _told(outcome["result"]))


def _told(result: Json) -> str:
    if "latency_ms_p50" in result:
        return f"{result['latency_ms_p50']:.2f} ms"
    spread = f"spread {result['latency_spread_pct']:.1f} %, " if "latency_spread_pct" in result else ""
    return f"latency left out: {spread}the machine is too noisy; the same command measures it again"


_HEAD = ("kind", "schema", "id", "coords", "key")


def picture(store: Store, executor: Executor, summary: Summary, tell: Tell) -> None:
    """The same images through the first networks of every baseline; written to panels.json."""
    panels: list[Json] = []
    palette: list[Any] = []
    for network, cells in _pictured(store):
        chosen = [{"id": cell.id, "title": _title(cell)} for cell in cells]
        outcome = _one(
            executor,
            _task(
                store, executor, "pictures", cells[0], {"cells": chosen, "name": network, "panels": store.grid.panels}
            ),
        )
        if outcome["status"] != "ok":
            summary.unmeasured[f"pictures of {network}"] = outcome["error"]
            tell("failed", f"pictures of {network}", outcome["error"])
            continue
        panels += outcome["result"]["panels"]
        palette = outcome["result"].get("palette", palette)
    write_json(
        store.root / "panels.json", {"kind": "vss.sweep_panels", "schema": 1, "panels": panels, "palette": palette}
    )


def _pictured(store: Store) -> Iterator[tuple[str, list[Cell]]]:
    """Of every network, cells of one seed at one budget: the first ones that are done."""
    table: dict[str, list[Cell]] = {}
    for cell in _done(store):
        table.setdefault(cell.coords.get("network", store.grid.name), []).append(cell)
    for network, cells in table.items():
        last = cells[-1].coords.get("budget")
        same = [
            c for c in cells if c.coords.get("budget") == last and c.coords.get("seed") == cells[0].coords.get("seed")
        ]
        yield network, same[:PICTURED]


def _title(cell: Cell) -> str:
    named = [cell.coords[axis] for axis in ("criterion", "variant", "budget") if axis in cell.coords]
    return " · ".join(named) or cell.id


def _done(store: Store) -> Iterable[Cell]:
    for cell in store.cells():
        record = store.record(cell.id)
        if record is not None and record["status"] == "ok":
            yield cell


def _task(store: Store, executor: Executor, kind: str, cell: Cell, extra: Json) -> Json:
    return {
        "kind": kind,
        "id": f"{kind}-{cell.id}",
        "share": store.share(cell),
        "root": str(store.root.resolve()),
        "study": store.grid.study,
        "plugins": list(store.grid.plugins),
        "recipe": cell.recipe().model_dump(mode="json"),
        "shared": {},
        "threads": executor.threads,
        "cell": cell.id,
        "extra": extra,
    }


def _one(executor: Executor, task: Json) -> Any:
    """Submit one task and wait for it; nothing else runs meanwhile."""
    executor.submit(task)
    while True:
        for outcome in executor.wait(0.5):
            if outcome.get("full"):
                raise VssError(f"the disk is full ({outcome['error']}); free some space and start again.")
            return outcome
