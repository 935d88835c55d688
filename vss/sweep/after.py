"""What follows when the cells are done: latencies, one network at a time on a machine that does nothing else, pictures,
the table, TensorBoard, MLflow, the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vss.core.errors import VssError
from vss.core.files import write_json
from vss.sweep import results
from vss.sweep.chart import write_chart, write_csv
from vss.sweep.drive import Summary, Tell
from vss.sweep.grid import Cell
from vss.sweep.local import Executor
from vss.sweep.store import Store
from vss.sweep.study import Json

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
        from vss.sweep.track import to_mlflow

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
