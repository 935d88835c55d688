"""The command line: `vss train prune finetune evaluate export build bench report run data methods quality lint doctor`.

Every command builds a recipe from its flags and calls a function of `vss.run`.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from vss.cli.build import build_app
from vss.cli.console import (
    COLUMNS,
    Batch,
    Ckpt,
    Data,
    Epochs,
    Mean,
    RecipeName,
    ReportFile,
    Root,
    Save,
    Seed,
    Set,
    Size,
    Split,
    Std,
    bars,
    budget_of,
    cores_of,
    err,
    latency_of,
    listen,
    options_of,
    out,
    recipe_of,
    say,
    show_gates,
    show_table,
    size_of,
    statistics_of,
    tell,
    write_figures,
)
from vss.cli.data import data_app
from vss.cli.exits import Commands
from vss.cli.export import export_app
from vss.cli.latency import explain_app, lut_app
from vss.cli.lint import lint_app
from vss.cli.methods import methods_app
from vss.cli.ship import ship_app
from vss.cli.sweep import sweep_app
from vss.core import yaml12
from vss.core.errors import GateFailed, NotMeasured, VssError
from vss.core.files import safe_name
from vss.core.locks import at_work
from vss.core.registry import load_plugin
from vss.run.project import Project, project_of

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
app.add_typer(data_app, name="data")
app.add_typer(export_app)
app.add_typer(methods_app)
app.add_typer(ship_app)
app.add_typer(build_app)
app.add_typer(lint_app)
app.add_typer(lut_app, name="lut")
app.add_typer(explain_app)
app.add_typer(sweep_app)


def main() -> None:
    """Entry point; `vss.cli.exits` says how it ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    for noisy in ("torch", "onnxscript", "onnx_ir", "lightning", "matplotlib", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    app()


@app.callback()
def _globals(
    plugin: Annotated[
        list[str] | None, typer.Option(help="import this module first: it registers nets, data, criteria")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more, and where an error came from")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="results and errors alone, no progress")] = False,
    log: Annotated[Path | None, typer.Option(help="append everything that is said to this file, line by line")] = None,
) -> None:
    listen(verbose=verbose, quiet=quiet, file=log)
    for module in plugin or []:
        load_plugin(module)


@app.command()
def train(
    save: Save = Path("runs/train"),
    recipe: RecipeName = None,
    dataset: Data = None,
    data_root: Root = None,
    model: Annotated[str | None, typer.Option(help="name of a network")] = None,
    option: Annotated[list[str] | None, typer.Option(help="name=value, an option of the network")] = None,
    input_size: Size = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    lr: Annotated[float | None, typer.Option()] = None,
    devices: Annotated[str | None, typer.Option(help="number of devices, or auto")] = None,
    num_nodes: Annotated[int | None, typer.Option()] = None,
    seed: Seed = None,
    overrides: Set = None,
) -> None:
    """Train a network; the best validation epoch is SAVE/best.safetensors. A killed training goes on when repeated."""
    from vss.run import steps

    job = recipe_of(
        recipe, overrides, data__dataset=dataset, data__root=data_root, data__size=size_of(input_size),
        model__name=model, model__options=options_of(option), train__epochs=epochs, train__batch_size=batch_size,
        train__lr=lr, train__devices=devices, train__num_nodes=num_nodes, seed=seed,
    )  # fmt: skip
    project = Project.open(job)
    net = project.build_model()
    result = steps.train(project, net, job.train, save, progress=bars())
    _told(result, project.task.title)


@app.command()
def prune(
    ckpt: Annotated[Path | None, typer.Option(help="a .safetensors checkpoint")] = None,
    model: Annotated[str | None, typer.Option(help="in place of --ckpt: name of a network, with --weights")] = None,
    weights: Annotated[Path | None, typer.Option(help="state dict of --model, .safetensors, .pt or .pth")] = None,
    input_size: Size = None,
    method: Annotated[str, typer.Option(help="a criterion: vss methods")] = "taylor",
    preset: Annotated[str | None, typer.Option(help="named options of the criterion: vss methods")] = None,
    option: Annotated[list[str] | None, typer.Option(help="name=value, an option of the criterion")] = None,
    global_ratio: Annotated[float | None, typer.Option(help="remove this fraction of all channels")] = None,
    local_ratio: Annotated[float | None, typer.Option(help="remove this fraction of every group")] = None,
    macs: Annotated[float | None, typer.Option(help="keep this fraction of the MACs")] = None,
    params: Annotated[float | None, typer.Option(help="keep this fraction of the parameters")] = None,
    latency: Annotated[str | None, typer.Option(help="0.5x of the uncut time, or 12ms, as measured")] = None,
    lut: Annotated[Path | None, typer.Option(help="a latency table; default: made in SAVE")] = None,
    align: Annotated[int, typer.Option(help="kept widths are multiples of this")] = 1,
    floor: Annotated[float, typer.Option(help="least fraction of a group that stays")] = 0.1,
    iterative: Annotated[int, typer.Option(help="rounds of scoring and cutting")] = 1,
    batches: Annotated[int, typer.Option(help="calibration batches")] = 30,
    save: Save = Path("runs/prune"),
    dataset: Data = None,
    data_root: Root = None,
    seed: Seed = None,
    overrides: Set = None,
    dry_run: Annotated[bool, typer.Option(help="print widths and locked layers, write nothing")] = False,
) -> None:
    """Score channels on training images, cut the network, prove the cut; writes plan.json and pruned.safetensors."""
    from vss.run import command, steps

    budget = budget_of(global_ratio, local_ratio, macs, params, latency) | {"align": align, "floor": floor}
    options = options_of([*([f"preset={preset}"] if preset else []), *(option or [])])
    section = {"criterion": method, "options": options or {}, "budget": budget, "steps": iterative, "batches": batches}
    section |= latency_of(latency, lut, dry_run)
    job = recipe_of(None, overrides, prune=section, seed=seed)
    project, net = command.network_to_prune(
        job, ckpt, model, weights, dataset=dataset, data_root=data_root, size=size_of(input_size)
    )
    if dry_run:
        groups, budget_ = steps.groups_of(project, net), steps.Budget.make(**job.prune.budget.model_dump())
        figures = steps.describe(steps.plan_once(project, net, job.prune, budget_, groups=groups), groups)
    else:
        with at_work(save, deep=False):
            _, figures = steps.prune(project, net, job.prune, save, progress=bars())
    widths = [{"name": g, "before": a, "after": b} for g, (a, b) in figures["widths"].items()]
    show_table(widths, {"name": "group", "before": "before", "after": "after"})
    for lock in figures["locked"]:
        out.print(f"locked: {lock['layer']}: {lock['reason']}")
    out.print("kept: " + ", ".join(f"{share:.1%} of the {kind}" for kind, share in figures["kept"].items()))
    if not dry_run:
        out.print(f"masked == sliced to {figures['checks']['masked_max_rel']:.1e} (relative); wrote {save}/plan.json")


@app.command()
def finetune(
    ckpt: Ckpt,
    save: Save = Path("runs/finetune"),
    recipe: RecipeName = None,
    teacher: Annotated[Path | None, typer.Option(help="unpruned checkpoint to distil from")] = None,
    distill: Annotated[float | None, typer.Option(help="weight of the distillation term")] = None,
    dataset: Data = None,
    data_root: Root = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    lr: Annotated[float | None, typer.Option()] = None,
    seed: Seed = None,
    overrides: Set = None,
) -> None:
    """Train a (pruned) checkpoint further, with the same `fit` as training."""
    from vss.run import steps
    from vss.run.preflight import teacher_of
    from vss.train import checkpoint

    if ckpt.resolve().parent == save.resolve():
        raise VssError(f"--ckpt {ckpt} lies in the folder that is written; choose another --save than {save}.")
    job = recipe_of(
        recipe, overrides, finetune__epochs=epochs, finetune__batch_size=batch_size, finetune__lr=lr,
        finetune__distill=distill, seed=seed,
    )  # fmt: skip
    project = project_of(ckpt, data_root=data_root, dataset=dataset, recipe=job)
    net = checkpoint.load(ckpt)
    source = teacher_of(teacher, project, net) if teacher else None
    fit = job.finetune
    if source and distill is None and not fit.distill:
        fit = fit.model_copy(update={"distill": 1.0})
    result = steps.train(project, net, fit, save, teacher=source, progress=bars())
    _told(result, project.task.title)


def _told(result: dict[str, Any], title: str) -> None:
    score = result[f"best_{result['metric']}"]
    out.print(
        f"best val {title} {score:.2f} in epoch {result['best_epoch'] + 1} of {result['epochs']}: {result['best']}"
    )


@app.command()
def evaluate(
    candidate: Annotated[Path, typer.Option("--candidate", "--ckpt", help="a checkpoint, or an ONNX file")],
    baseline: Annotated[Path | None, typer.Option(help="compare with this one")] = None,
    split: Split = "test",
    dataset: Data = None,
    data_root: Root = None,
    input_size: Size = None,
    mean: Mean = None,
    std: Std = None,
    max_drop: Annotated[float | None, typer.Option(help="gate: points of mIoU (or AP) that may be lost")] = None,
    max_fnr_increase: Annotated[float | None, typer.Option(help="gate: points of missed defects, on val")] = None,
    max_ap_drop: Annotated[float | None, typer.Option(help="gate: points of average precision, on val")] = None,
    bench_seconds: Annotated[float, typer.Option(help="of a pair, to time both; 0: not")] = 4.0,
    oracle: Annotated[int, typer.Option(help="of a pair of checkpoints, channels left out one by one; 0: none")] = 32,
    report: ReportFile = None,
) -> None:
    """Score a checkpoint or an engine, alone or against a baseline; of a pair also speed and agreement."""
    from vss.run import command
    from vss.sweep import pair

    figures = command.evaluate(
        candidate,
        baseline,
        split=split,
        dataset=dataset,
        data_root=data_root,
        size=size_of(input_size),
        max_drop=max_drop,
        max_fnr_increase=max_fnr_increase,
        max_ap_drop=max_ap_drop,
        statistics=statistics_of(mean, std),
    )
    if baseline and bench_seconds:
        noisy = pair.speed(figures["rows"], baseline, candidate, seconds=bench_seconds)
        if noisy:
            tell(out, "no times:", "yellow", noisy)
    if baseline and {baseline.suffix, candidate.suffix} == {".safetensors"}:
        figures |= pair.agreement(baseline, candidate, dataset=dataset, data_root=data_root, channels=oracle)
        out.print(f"outputs moved by {figures['reconstruction_relative']:.3f} of their mean square", highlight=False)
        if figures.get("oracle_overlap") is not None:
            text = "an oracle's best channels among the kept: {oracle_overlap:.2f} (chance {oracle_chance:.2f})"
            out.print(text.format(**figures), highlight=False)
    more = {"class_acc_pct": "class acc %", "boundary_iou_pct": "boundary IoU %", "fps": "images/s"}
    show_table(figures["rows"], COLUMNS | {"pixel_acc_pct": "pixel acc %", "fwiou_pct": "FWIoU %"} | more)
    write_figures(report, "vss.evaluation", figures)
    if max_drop is None and "comparison" in figures:
        out.print(figures["comparison"], highlight=False)
    if "gate" in figures:
        show_gates(figures["gate"])
        if figures["gate"]["passed"] is False:
            raise GateFailed(f"gate {figures['gate']['sentence']}")


@app.command()
def bench(
    candidate: Annotated[Path, typer.Option(help="an engine or a checkpoint")],
    baseline: Annotated[Path | None, typer.Option(help="the one to be faster than")] = None,
    backend: Annotated[str | None, typer.Option(help="of engines; default: the one that they are for")] = None,
    threads: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int, typer.Option()] = 1,
    device: Annotated[str, typer.Option(help="of checkpoints, which run in torch: cpu or cuda")] = "cpu",
    precision: Annotated[str, typer.Option(help="of checkpoints: fp32 or fp16")] = "fp32",
    max_seconds: Annotated[float, typer.Option()] = 30.0,
    cores: Annotated[str | None, typer.Option(help="pin all threads to these, such as 0,1")] = None,
    allow_unstable: Annotated[bool, typer.Option(help="print figures of a noisy machine too")] = False,
    report: ReportFile = None,
) -> None:
    """Time engines, interleaved window by window, until stable; figures that do not stand still are refused."""
    from vss.deploy.bench import noise, pinned
    from vss.run import command

    with pinned(cores_of(cores)):
        figures = command.bench_engines(
            candidate, baseline, backend=backend, threads=threads, batch=batch_size, max_seconds=max_seconds,
            device=device, precision=precision,
        )  # fmt: skip
    write_figures(report, "vss.bench", figures)
    noisy = noise(figures)
    if noisy and not allow_unstable:
        raise NotMeasured(f"no figures: {noisy} --allow-unstable prints them all the same.")
    rows = [
        {"name": name, **session, "speedup": figures["speedup"].get(name, {}).get("ratio")}
        for name, session in figures["sessions"].items()
    ]
    heads = {"latency_ms_p90": "p90 ms", "latency_ms_p99": "p99 ms", "latency_ms_cold": "first call ms"}
    more = {"throughput_fps": "FPS", "speedup": "speed-up"}
    show_table(rows, {"name": "engine", "latency_ms_p50": "p50 ms", **heads, **more})
    cpu = figures["environment"]["cpu"]
    used = figures["sessions"]["candidate"]["describe"].get("threads")
    out.print(f"{used or 'all'} threads on cores {', '.join(map(str, cpu['cores']))}", highlight=False)
    if noisy:
        tell(out, "not stable:", "yellow", noisy)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="folder of a run")]) -> None:
    """Write report.html from report.json again."""
    from vss.run.page import write_page

    out.print(f"wrote {write_page(run / 'report.json', run / 'report.html')}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a packaged recipe or a YAML file")],
    to: Annotated[Path | None, typer.Option("--out", help="folder; default runs/RECIPE")] = None,
    overrides: Set = None,
    max_fnr_increase: Annotated[float | None, typer.Option(help="gate.max_fnr_increase")] = None,
    max_ap_drop: Annotated[float | None, typer.Option(help="gate.max_ap_drop")] = None,
    dry_run: Annotated[bool, typer.Option(help="print the recipe in full and stop")] = False,
) -> None:
    """Do a whole recipe: train, prune, fine-tune, evaluate, export, build, gate, bench, report. Resumes.

    A packaged grid (ksdd_sweep) is a sweep; CRITERION_BUDGET (ours_c4_r40) is one row of such a grid by itself.
    """
    from vss.cli.sweep import row_recipe, run_grid

    limits = {"max_fnr_increase": max_fnr_increase, "max_ap_drop": max_ap_drop}
    given = [f"gate.{key}={value}" for key, value in limits.items() if value is not None]
    overrides = [*given, *(overrides or [])]
    if run_grid(recipe, to, overrides, dry_run=dry_run):
        return
    job = row_recipe(recipe, overrides) or recipe_of(recipe, overrides)
    if dry_run:
        out.print(yaml12.dump(job.model_dump(mode="json")), highlight=False)
        return

    from vss.core.report import read_report
    from vss.run.job import run as run_recipe

    folder = to or Path("runs") / safe_name(job.name)
    command = "vss " + shlex.join(sys.argv[1:])
    try:
        result = run_recipe(job, folder, say=say, progress=bars(), command=command)
    except GateFailed:
        _final(read_report(folder / "report.json"), job.name)
        raise
    _final(result, job.name)
    page = folder / "report.html"
    out.print(f"report: {page}")
    if noisy := result["bench"]["noise"]:
        raise NotMeasured(f"all but the times is done and stands in {page}. {noisy} The same command times again.")


def _final(report: dict[str, Any], name: str) -> None:
    show_table(report["rows"], COLUMNS, name)
    show_gates(report["gate"])


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Say what is native, what is missing and how to get it."""
    from vss.cli.doctor import diagnose, to_json

    findings = diagnose()
    if as_json:
        out.print_json(json.dumps(to_json(findings)))
        return
    rows = [{"name": f.name, "status": f.status, "what": f.what, "fix": f.fix} for f in findings]
    show_table(rows, {"name": "part", "status": "status", "what": "what", "fix": "how to get it"})


if __name__ == "__main__":
    main()
