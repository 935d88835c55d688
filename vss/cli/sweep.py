"""`vss sweep`, `benchmark`, `finetune-batch` and `compare`: many runs with one command, and what they tell apart."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from rich.progress import BarColumn, Progress, TextColumn
from typer import Argument, Option

from vss.cli.console import bars, command_line, log, out, print_table, print_tagged, write_figures
from vss.cli.options import (
    DATA,
    Criteria,
    Given,
    OutFolder,
    ReportFile,
    Set,
    network_of,
    numbers_of,
    recipe_keys,
    takes,
)
from vss.core.config import Recipe
from vss.core.errors import GateFailed
from vss.core.yaml12 import Override, assignment

if TYPE_CHECKING:
    from vss.sweep import Grid
    from vss.sweep.run import Summary

Dry = Annotated[bool, Option("--dry-run", help="list the trials and stop")]
Epochs = Option("--finetune-epochs", "--epochs", min=0, help="passes over the training images; 0: none")


def executor_of(
    executor: Annotated[Literal["local", "ray"], Option(help="this machine, or a Ray cluster")] = "local",
    workers: Annotated[
        int | None, Option(min=1, help="trials at a time; default: one a GPU, or one for two cores")
    ] = None,
    threads: Annotated[int | None, Option(min=1, help="CPU threads of a trial; default: its share of cores")] = None,
    retries: Annotated[int, Option(min=0, help="how often a failed trial is tried again")] = 1,
    address: Annotated[str | None, Option(help="address of a Ray cluster; default: one is started here")] = None,
    gpus: Annotated[float | None, Option(min=0, help="GPUs of a trial on Ray, may be a fraction")] = None,
) -> Given:
    """By whom a sweep is done, as `vss.sweep.Settings` takes it."""
    return {
        "executor": executor, "workers": workers, "threads": threads, "retries": retries, "address": address,
        "gpus": gpus,
    }  # fmt: skip


def folder_of(
    extend: Annotated[bool, Option("--extend", help="go on in a folder that holds another sweep")] = False,
    mlflow: Annotated[bool, Option("--mlflow", help="write MLflow runs to SAVE/mlruns as well")] = False,
    dry_run: Dry = False,
) -> Given:
    """What is done with the folder of a sweep."""
    return {"extend": extend, "mlflow": mlflow, "dry_run": dry_run}


@takes(executor=executor_of, how=folder_of)
def sweep(
    grid: Annotated[Path, Argument(help="packaged grid or YAML file: networks, criteria, budgets, seeds")],
    executor: Given,
    how: Given,
    to: OutFolder = Path("runs/sweep"),
    overrides: Set = None,
) -> None:
    """Do a grid of runs: networks x criteria x budgets x seeds.

    The same command goes on where it was stopped; a failed trial does not stop the rest.
    """
    from vss.sweep import load_grid

    _run_trials(load_grid(grid, _dotted(overrides)), to, executor, **how)


@takes(given=recipe_keys(*DATA), network=network_of, executor=executor_of, how=folder_of)
def benchmark(
    criteria: Criteria,
    baseline: Annotated[Path, Option("--ckpt", "--baseline", help="checkpoint to read, or folder of a run")],
    given: Given,
    network: Given,
    executor: Given,
    how: Given,
    ratios: Annotated[str, Option(help="fractions to remove, with commas between, 0 to below 1")] = "0.5",
    budget: Annotated[Literal["macs", "params", "channels"], Option(help="what fractions are of")] = "macs",
    seeds: Annotated[int, Option(min=1, help="number of seeds")] = 1,
    finetune_epochs: Annotated[int | None, Epochs] = None,
    to: OutFolder = Path("runs/benchmark"),
    overrides: Set = None,
) -> None:
    """Compare pruning criteria on one trained network, all at equal cost, as a sweep."""
    from vss.sweep.grid import benchmark_grid

    epochs = {} if finetune_epochs is None else {"finetune.epochs": finetune_epochs}
    removed = numbers_of(
        "--ratios", ratios, "fractions to remove, with commas between (0.1,0.3), at least 0 and below 1,",
        counts=range(1, 1000), low=0, high=1 - 1e-9, whole=False,
    )  # fmt: skip
    budgets = [f"{budget}:{round(1 - ratio, 6)}" for ratio in removed]
    names = [name.strip() for name in criteria.split(",")]
    grid = benchmark_grid(to.name, baseline, names, budgets, seeds, given | network | epochs | _dotted(overrides))
    _run_trials(grid, to, executor, **how)


@takes(executor=executor_of)
def finetune_batch(
    folder: Annotated[Path, Option("--sweep", "--benchmark-dir", help="folder of a sweep, written in place")],
    finetune_epochs: Annotated[int, Epochs],
    executor: Given,
    overrides: Set = None,
) -> None:
    """Fine-tune every pruned network of a sweep by one recipe, in place; nothing else of it is computed again."""
    from vss.sweep import Store
    from vss.sweep.grid import finetune_grid

    grid = finetune_grid(Store.read(folder).grid, {"finetune.epochs": finetune_epochs} | _dotted(overrides))
    _run_trials(grid, folder, executor, extend=True)


def compare(
    a: Annotated[Path, Argument(help="folder of a sweep or a run")],
    b: Annotated[Path, Argument(help="folder of another one, the newer")],
    report: ReportFile = None,
) -> None:
    """Compare two sweeps, over seeds, or two runs, over images: what got better, what got worse, what is within noise.

    Exit code 0 whatever the verdicts are (a gate is `vss evaluate --max-drop`), 2 where the two cannot be compared.
    """
    from vss.sweep.compare import compare as compare_folders
    from vss.sweep.compare import summarise

    figures = compare_folders(a, b)
    heads = {"name": "network", "metric": "figure", "a": "before", "b": "after", "change": "change",
             "half": "95 % +-", "span": "95 %", "verdict": "verdict"}  # fmt: skip
    spans = [
        {"span": "{:.2f} to {:.2f}".format(*row["interval"])} if "interval" in row else {} for row in figures["rows"]
    ]
    print_table([row | span for row, span in zip(figures["rows"], spans, strict=True)], heads)
    for row in figures["rows"]:
        if row.get("note") and row["verdict"] != "not judged":
            out.print(f"{row['name']}: {row['note']}", highlight=False)
    for side, names in ((a, figures["only_a"]), (b, figures["only_b"])):
        if names:
            out.print(f"only in {side}: {', '.join(names)}", highlight=False)
    out.print(summarise(figures["rows"]), highlight=False)
    write_figures(report, "vss.comparison", figures)


def run_grid(name: str, folder: Path | None, overrides: Iterable[Override], *, dry_run: bool) -> bool:
    """Do a packaged grid on this machine, where `name` is one; whether it is."""
    from vss.sweep import load_grid
    from vss.sweep.grid import grids

    if name not in grids():
        return False
    _run_trials(load_grid(name, _dotted(overrides)), folder or Path("runs") / name, {}, dry_run=dry_run)
    return True


def row_recipe(name: str, overrides: Iterable[Override]) -> Recipe | None:
    """The recipe of one row of a packaged grid, where `name` is one."""
    from vss.sweep.grid import named_recipe

    return named_recipe(name, _dotted(overrides))


def _dotted(overrides: Iterable[Override] | None) -> Given:
    """--set a.b=c as {"a.b": c}."""
    return dict(assignment(each) if isinstance(each, str) else each for each in overrides or [])


def _run_trials(
    grid: Grid, folder: Path, executor: Given, *, extend: bool = False, mlflow: bool = False, dry_run: bool = False
) -> None:
    from vss.sweep import Settings
    from vss.sweep import sweep as run_sweep
    from vss.sweep.experiment import experiment
    from vss.sweep.grid import AXES
    from vss.sweep.run import Summary, named, require_some

    if dry_run:
        trials = named(grid.trials(), experiment(grid.study, grid.plugins))
        heads = {"name": "trial", **{axis: axis for axis in AXES.values()}, "fault": "cannot be run"}
        print_table(
            [{"name": trial.id, **trial.coords, "fault": trial.fault or None} for trial in trials], heads, grid.name
        )
        out.print(f"{len(trials)} trials")
        require_some(trials)
        return
    summary, settings = Summary(), Settings(**executor)
    bar = _Bar(summary)
    with bar.bar:
        try:
            run_sweep(grid, folder, settings=settings, tell=bar.print, summary=summary, extend=extend,
                      command=command_line(), mlflow=mlflow)  # fmt: skip
        except KeyboardInterrupt as error:
            error.add_note(summary.sentence())
            raise
    print_summary(summary, folder)


class _Bar:
    """Lines for what happens and, on a terminal, a bar with the time left."""

    COLOURS: ClassVar = {"ok": "green", "failed": "red", "lost": "yellow", "retry": "yellow", "skipped": "cyan"}

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self.bar = Progress(*columns, console=out, transient=True, disable=not bars())
        self.line = self.bar.add_task("", total=None, left="")

    def print(self, what: str, name: str, detail: str) -> None:
        known = self.summary
        if what == "plan":
            out.print(detail, highlight=False)
        elif what == "page":
            out.print(f"report: {name}", highlight=False)
        elif what != "start" and (what not in ("ok", "skipped") or log.isEnabledFor(logging.INFO)):
            tag = f"{time.strftime('%H:%M:%S')} {what:>7}"
            print_tagged(out, tag, self.COLOURS[what], f"{name}  {detail}")
        done = known.ok + known.skipped + len(known.failed)
        text, left = f"{done}/{known.total} trials", f"{known.left()} left"
        self.bar.update(self.line, description=text, total=known.total or None, completed=done, left=left)
        out.file.flush()


def print_summary(summary: Summary, folder: Path) -> None:
    """How a sweep ended; `GateFailed` where a trial or a time of one is missing."""
    out.print(summary.sentence(), highlight=False)
    for name, reason in summary.failed.items():
        print_tagged(out, "failed:", "red", f"{name}: {reason}")
        file = folder / "logs" / f"{name}.log"
        if file.is_file():
            out.print("".join(f"    {line}\n" for line in file.read_text().splitlines()[-12:]), highlight=False)
    for name, reason in summary.unmeasured.items():
        print_tagged(out, "failed:", "red", f"{name}: {reason}")
    if summary.failed:
        raise GateFailed(f"{len(summary.failed)} of {summary.total} trials; the others are done, see {folder}.")
    if summary.unmeasured:
        raise GateFailed(f"all trials are done, and {len(summary.unmeasured)} figures of them could not be measured.")
