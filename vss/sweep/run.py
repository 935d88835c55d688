"""`sweep`: from a grid to a finished folder."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vss.core.config import Recipe
from vss.core.environment import environment
from vss.core.errors import VssError, unknown
from vss.core.files import sha256_json
from vss.core.locks import at_work, remove_leftovers
from vss.sweep.after import finish
from vss.sweep.drive import Summary, Tell, drive
from vss.sweep.grid import Cell, Grid
from vss.sweep.local import Executor, LocalExecutor
from vss.sweep.store import Store
from vss.sweep.study import Study, study

EXECUTORS = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """By whom a sweep is done.

    Attributes:
        executor: "local" or "ray".
        workers: cells at a time; None: one a device, or one for every two cores.
        threads: CPU threads of a cell; None: its share of the cores.
        retries: how often a failed or lost cell is tried again.
        address: of a Ray cluster; None starts one here.
        gpus: of a cell on Ray, may be a fraction.
    """

    executor: str = "local"
    workers: int | None = None
    threads: int | None = None
    retries: int = 1
    address: str | None = None
    gpus: float | None = None

    def open(self) -> Executor:
        """The executor, its workers not started yet."""
        if self.executor not in EXECUTORS:
            raise unknown("executor", self.executor, EXECUTORS)
        if self.workers is not None and self.workers < 1:
            raise VssError(f"{self.workers} workers do nothing; give at least 1.")
        if self.executor == "ray":
            from vss.sweep.ray import RayExecutor

            return RayExecutor(self.workers, threads=self.threads, gpus=self.gpus, address=self.address)
        return LocalExecutor(self.workers or default_workers(), threads=self.threads)


def default_workers() -> int:
    """One a CUDA device; without devices one for every two cores."""
    from vss.core.environment import cuda_devices

    return len(cuda_devices()) or max(1, len(os.sched_getaffinity(0)) // 2)


def checked(cells: list[Cell], work: Study, *, here: bool) -> list[Cell]:
    """The cells, those that can be known to be impossible with their `fault`; a `VssError` where all of them are."""
    known: dict[str, str] = {}
    found = []
    for cell in cells:
        fault = cell.fault
        try:
            if not fault:
                recipe = cell.recipe()
                work.check(recipe)
                key = sha256_json(work.preflight_of(recipe))
                if key not in known:
                    known[key] = _fault(work, recipe, here=here)
                fault = known[key]
        except VssError as error:
            fault = str(error)
        found.append(replace(cell, fault=fault))
    if all(cell.fault for cell in found):
        more = "" if len({cell.fault for cell in found}) == 1 else f" ({found[0].id}; the others have faults as well)"
        raise VssError(f"no cell of the sweep can be run: {found[0].fault}{more}")
    return found


def _fault(work: Study, recipe: Recipe, *, here: bool) -> str:
    try:
        work.preflight(recipe, here=here)
    except VssError as error:
        return str(error)
    return ""


def sweep(
    grid: Grid,
    out: Path | str,
    *,
    settings: Settings | None = None,
    tell: Tell = lambda *_: None,
    summary: Summary | None = None,
    extend: bool = False,
    command: str = "",
    mlflow: bool = False,
) -> Summary:
    """Do every cell of a grid that is not done yet; see `vss.sweep.store` for what is in `out` afterwards.

    Args:
        grid: what.
        out: folder; holds this sweep or nothing.
        settings: by whom.
        tell: called for everything that happens.
        summary: filled while the sweep goes on.
        extend: go on in a folder that holds another sweep; cells that both have are not repeated.
        command: how the sweep was started, for the report.
        mlflow: also write every cell as a run into `out/mlruns`.
    """
    work = study(grid.study, grid.plugins)
    settings, out = settings or Settings(), Path(out)
    cells = checked(grid.cells(), work, here=settings.executor == "local")
    about = {"command": command, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "environment": environment()}
    executor = settings.open()
    try:
        with at_work(out, deep=False):
            store = Store.make(out, grid, about=about, replace=extend)
            for part in ("cells", "shared"):
                remove_leftovers(out / part, deep=False)
            result = drive(store, cells, executor, retries=settings.retries, tell=tell, summary=summary)
            tell("page", str(finish(store, executor, result, tell=tell, mlflow=mlflow)), "")
            return result
    finally:
        executor.close()
