"""The master table of a sweep as CSV, and its picture: bars of the score and the miss rate, trade-off against MACs."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.core.errors import VssError
from vss.core.files import atomic
from vss.run.page.tradeoff import pareto

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
