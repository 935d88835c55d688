"""`vss sweep`, `vss benchmark`, `vss finetune-batch`: many runs with one command."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.progress import BarColumn, Progress, TextColumn

from vss.cli.console import Data, ReportFile, Root, Set, bars, log, out, show_table, tell, write_figures
from vss.core.errors import GateFailed, VssError
from vss.core.yaml12 import assignment

if TYPE_CHECKING:
    from vss.core.config import Recipe
    from vss.sweep.drive import Summary
    from vss.sweep.grid import Grid
    from vss.sweep.run import Settings

sweep_app = typer.Typer()

Folder = Annotated[Path, typer.Option("--out", "--out-dir", help="folder of the sweep")]
ExecutorName = Annotated[str, typer.Option("--executor", help="local or ray")]
Workers = Annotated[int | None, typer.Option("--workers", help="cells at a time")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads of a cell")]
Retries = Annotated[int, typer.Option("--retries", help="how often a failed cell is tried again")]
Address = Annotated[str | None, typer.Option("--address", help="of a Ray cluster; without it one is started here")]
Gpus = Annotated[float | None, typer.Option("--gpus", help="of a cell on Ray, may be a fraction")]
Extend = Annotated[bool, typer.Option("--extend", help="go on in a folder that holds another sweep")]
MlFlow = Annotated[bool, typer.Option("--mlflow", help="also write every cell as an MLflow run into OUT/mlruns")]
Dry = Annotated[bool, typer.Option("--dry-run", help="list the cells and stop")]
FinetuneEpochs = Annotated[int | None, typer.Option("--finetune-epochs", help="of every pruned network; 0: none")]


@sweep_app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="a YAML file (networks, criteria, budgets, seeds), or a packaged grid")],
    to: Folder = Path("runs/sweep"),
    executor: ExecutorName = "local",
    workers: Workers = None,
    threads: Threads = None,
    retries: Retries = 1,
    address: Address = None,
    gpus: Gpus = None,
    extend: Extend = False,
    mlflow: MlFlow = False,
    overrides: Set = None,
    dry_run: Dry = False,
) -> None:
    """Do a grid of runs: networks x criteria x budgets x seeds. Resumes; a failed cell does not stop the rest."""
    from vss.sweep import load_grid

    settings = _settings(executor, workers, threads, retries, address, gpus)
    _go(load_grid(grid, _dotted(overrides)), to, settings, extend=extend, mlflow=mlflow, dry_run=dry_run)


@sweep_app.command()
def benchmark(
    methods: Annotated[str, typer.Option(help="criteria, with commas between; METHOD:PRESET takes a preset")],
    baseline: Annotated[Path, typer.Option(help="folder of a run, or a checkpoint")],
    ratios: Annotated[str, typer.Option(help="fractions to remove, with commas between")] = "0.5",
    budget: Annotated[str, typer.Option(help="of what: macs, params or channels")] = "macs",
    seeds: Annotated[int, typer.Option(help="how many")] = 1,
    to: Folder = Path("runs/benchmark"),
    finetune_epochs: FinetuneEpochs = None,
    dataset: Data = None,
    data_root: Root = None,
    executor: ExecutorName = "local",
    workers: Workers = None,
    threads: Threads = None,
    retries: Retries = 1,
    address: Address = None,
    gpus: Gpus = None,
    extend: Extend = False,
    mlflow: MlFlow = False,
    overrides: Set = None,
    dry_run: Dry = False,
) -> None:
    """A sweep over pruning methods on one trained network, all at equal cost."""
    from vss.sweep.start import benchmark_grid

    flags = {"data.dataset": dataset, "data.root": data_root, "finetune.epochs": finetune_epochs}
    changes = {key: value for key, value in flags.items() if value is not None} | _dotted(overrides)
    keep = [_removed(text) for text in ratios.split(",")]
    grid = benchmark_grid(
        to.name, baseline, [m.strip() for m in methods.split(",")], [f"{budget}:{k}" for k in keep], seeds, changes
    )
    settings = _settings(executor, workers, threads, retries, address, gpus)
    _go(grid, to, settings, extend=extend, mlflow=mlflow, dry_run=dry_run)


@sweep_app.command("finetune-batch")
def finetune_batch(
    benchmark_dir: Annotated[Path, typer.Option(help="folder of a sweep")],
    finetune_epochs: Annotated[int, typer.Option(help="of every pruned network")],
    executor: ExecutorName = "local",
    workers: Workers = None,
    threads: Threads = None,
    retries: Retries = 1,
    address: Address = None,
    gpus: Gpus = None,
    overrides: Set = None,
) -> None:
    """Fine-tune every pruned network of a sweep by one recipe, in place; nothing else of it is computed again."""
    from vss.sweep.start import finetune_grid

    grid = finetune_grid(benchmark_dir, {"finetune.epochs": finetune_epochs} | _dotted(overrides))
    settings = _settings(executor, workers, threads, retries, address, gpus)
    _go(grid, benchmark_dir, settings, extend=True)


@sweep_app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="folder of a sweep or a run")],
    b: Annotated[Path, typer.Argument(help="folder of another one, the newer")],
    report: ReportFile = None,
) -> None:
    """Compare two sweeps, over seeds, or two runs, over images: what got better, what got worse, what is within noise.

    Exit code 0 whatever the verdicts are: a gate is `vss evaluate --max-drop`. 2 where the two cannot be compared.
    """
    from vss.sweep.compare import compare as compare_folders
    from vss.sweep.compare import summarise

    figures = compare_folders(a, b)
    heads = {"name": "network", "metric": "figure", "a": "before", "b": "after", "change": "change",
             "half": "95 % +-", "span": "95 %", "verdict": "verdict"}  # fmt: skip
    spans = [
        {"span": "{:.2f} to {:.2f}".format(*row["interval"])} if "interval" in row else {} for row in figures["rows"]
    ]
    show_table([row | span for row, span in zip(figures["rows"], spans, strict=True)], heads)
    for row in figures["rows"]:
        if row.get("note") and row["verdict"] != "not judged":
            out.print(f"{row['name']}: {row['note']}", highlight=False)
    for side, names in ((a, figures["only_a"]), (b, figures["only_b"])):
        if names:
            out.print(f"only in {side}: {', '.join(names)}", highlight=False)
    out.print(summarise(figures["rows"]), highlight=False)
    write_figures(report, "vss.comparison", figures)


def run_grid(name: str, folder: Path | None, overrides: list[str] | None, *, dry_run: bool) -> bool:
    """Do a packaged grid on this machine, where `name` is one; whether it is."""
    from vss.sweep import Settings, load_grid
    from vss.sweep.grid import grids

    if name not in grids():
        return False
    _go(load_grid(name, _dotted(overrides)), folder or Path("runs") / name, Settings(), dry_run=dry_run)
    return True


def row_recipe(name: str, overrides: list[str] | None) -> Recipe | None:
    """The recipe of one row of a packaged grid, where `name` is one."""
    from vss.core.config import recipes
    from vss.sweep.grid import named_recipe

    if name in recipes() or Path(name).suffix in (".yaml", ".yml"):
        return None
    return named_recipe(name, _dotted(overrides))


def _settings(
    executor: str, workers: int | None, threads: int | None, retries: int, address: str | None, gpus: float | None
) -> Settings:
    from vss.sweep import Settings

    return Settings(executor=executor, workers=workers, threads=threads, retries=retries, address=address, gpus=gpus)


def _dotted(overrides: list[str] | None) -> dict[str, Any]:
    """--set a.b=c as {"a.b": c}."""
    return dict(assignment(setting) for setting in overrides or [])


def _removed(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError as error:
        raise VssError(f"--ratios takes fractions to remove (0.1,0.3) and got {text!r}.") from error
    if not 0 <= ratio < 1:
        raise VssError(f"--ratios takes fractions to remove, at least 0 and below 1, and got {text}.")
    return round(1 - ratio, 6)


def _go(
    grid: Grid, folder: Path, settings: Settings, *, extend: bool = False, mlflow: bool = False, dry_run: bool = False
) -> None:
    from vss.sweep import sweep as run_sweep
    from vss.sweep.drive import Summary

    if dry_run:
        cells = grid.cells()
        show_table([{"name": cell.id, **cell.coords, "fault": cell.fault or None} for cell in cells],
                   {"name": "cell", "network": "network", "criterion": "criterion", "budget": "budget",
                    "seed": "seed", "variant": "variant", "fault": "cannot be run"}, grid.name)  # fmt: skip
        out.print(f"{len(cells)} cells")
        return
    summary = Summary()
    command = "vss " + shlex.join(sys.argv[1:])
    with _Bar(summary) as bar:
        try:
            run_sweep(grid, folder, settings=settings, tell=bar.tell, summary=summary, extend=extend, command=command,
                      mlflow=mlflow)  # fmt: skip
        except KeyboardInterrupt as error:
            error.add_note(summary.sentence())
            raise
    _end(summary, folder)


class _Bar:
    """Lines for what happens and, on a terminal, a bar with the time left."""

    COLOURS: ClassVar = {"ok": "green", "failed": "red", "lost": "yellow", "retry": "yellow", "skipped": "cyan"}

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self.bar = Progress(*columns, console=out, transient=True, disable=not bars())
        self.line = self.bar.add_task("", total=None, left="")

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def tell(self, what: str, name: str, detail: str) -> None:
        """What `vss.sweep.drive` says."""
        known = self.summary
        if what == "plan":
            out.print(detail, highlight=False)
        elif what == "page":
            out.print(f"report: {name}", highlight=False)
        elif what != "start" and (what not in ("ok", "skipped") or log.isEnabledFor(logging.INFO)):
            tell(out, f"{time.strftime('%H:%M:%S')} {what:>7}", self.COLOURS[what], f"{name}  {detail}")
        done = known.ok + known.skipped + len(known.failed)
        text = f"{done}/{known.total} cells"
        self.bar.update(
            self.line, description=text, total=known.total or None, completed=done, left=f"{known.left()} left"
        )
        out.file.flush()


def _end(summary: Summary, folder: Path) -> None:
    out.print(summary.sentence(), highlight=False)
    for name, reason in summary.failed.items():
        tell(out, "failed:", "red", f"{name}: {reason}")
        log = folder / "logs" / f"{name}.log"
        if log.is_file():
            out.print("".join(f"    {line}\n" for line in log.read_text().splitlines()[-12:]), highlight=False)
    for name, reason in summary.unmeasured.items():
        tell(out, "failed:", "red", f"{name}: {reason}")
    if summary.unmeasured and not summary.failed:
        raise GateFailed(f"all cells are done, and {len(summary.unmeasured)} figures of them could not be measured.")
    if summary.failed:
        raise GateFailed(f"{len(summary.failed)} of {summary.total} cells; the others are done, see {folder}.")
