"""Grids that commands begin with: a benchmark of methods on one trained network, and fine-tuning of what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vss.core.errors import VssError
from vss.core.report import read_report
from vss.core.yaml12 import parse
from vss.sweep.grid import Grid
from vss.sweep.store import Store
from vss.train import checkpoint

NETS = ("baseline.safetensors", "best.safetensors")


def benchmark_grid(
    name: str, baseline: Path, methods: list[str], budgets: list[str], seeds: int, changes: dict[str, Any]
) -> Grid:
    """Methods x budgets x seeds on one trained network.

    Args:
        name: of the sweep.
        baseline: a checkpoint, or a folder with one; the report of a run beside it gives data and schedules.
        methods: criteria, as METHOD or METHOD:PRESET.
        budgets: as KIND:KEEP.
        seeds: how many.
        changes: dotted keys of the recipe.
    """
    if seeds < 1:
        raise VssError(f"{seeds} seeds are no benchmark; give at least 1.")
    file = _checkpoint(baseline)
    saved = checkpoint.read(file)
    if saved.preprocess is None:
        raise VssError(f"{file} does not say its preprocessing; save it with vss.save(..., preprocess=...).")
    report = file.parent / "report.json"
    base: dict[str, Any] = dict(read_report(report)["recipe"]) if report.is_file() else {}
    dataset = saved.info.get("dataset")
    data = base.get("data", {}) | {"size": saved.preprocess["size"]} | ({"dataset": dataset} if dataset else {})
    base |= {"data": data, "model": {"name": getattr(saved.model, "name", ""), "checkpoint": str(file.resolve())}}
    axes = {"criteria": methods, "budgets": budgets, "seeds": list(range(seeds))}
    content = {"name": name, "base": base, "set": changes, **axes}
    grid: Grid = parse(Grid, content, source="the command line")
    return grid


def _checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    found = next((path / name for name in NETS if (path / name).is_file()), None)
    if found is None:
        raise VssError(f"{path} holds no trained network; expected {' or '.join(NETS)} in it, or a checkpoint.")
    return found


def finetune_grid(folder: Path, changes: dict[str, Any]) -> Grid:
    """The grid of a finished sweep with another fine-tuning."""
    store = Store.read(folder)
    wrong = next((key for key in changes if not key.startswith("finetune.")), None)
    if wrong:
        raise VssError(f"finetune-batch changes the fine-tuning alone, and {wrong} is not of it; start a sweep.")
    grid = store.grid.model_copy(update={"set": {**store.grid.set, **changes}})
    return grid
