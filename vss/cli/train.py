"""`vss run`, `train`, `finetune`, `prune`, `methods` and `quality`: from data to a smaller network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress
from typer import Argument, Option

from vss.cli.console import (
    COLUMNS,
    bars,
    command_line,
    err,
    out,
    print_gates,
    print_open,
    print_step,
    print_table,
    write_figures,
)
from vss.cli.options import (
    DATA,
    Ckpt,
    Criteria,
    Given,
    RecipeName,
    ReportFile,
    Save,
    Set,
    network_of,
    options_of,
    recipe_keys,
    recipe_of,
    refuse_given,
    takes,
)
from vss.core import yaml12
from vss.core.config import Recipe, recipes
from vss.core.errors import GateFailed, NotMeasured, VssError
from vss.core.files import at_work, require_checkpoint, safe_name
from vss.core.yaml12 import Override

if TYPE_CHECKING:
    from vss.run.pruning import Pruned

MIN_KEPT = 0.001
"""Smallest fraction that a budget may keep, as `prune.budget.keep`."""


@takes(given=recipe_keys("gate.max_fnr_increase", "gate.max_ap_drop"))
def run(
    recipe: Annotated[str, Argument(help="packaged recipe or YAML file")],
    given: Given,
    to: Annotated[Path | None, Option("--save", "--out", help="folder to write; default: runs/RECIPE")] = None,
    overrides: Set = None,
    dry_run: Annotated[bool, Option(help="print the recipe in full and stop")] = False,
) -> None:
    """Do a whole recipe: train, prune, fine-tune, evaluate, export, build, gate, bench, report.

    The same command goes on where it was stopped. A packaged grid (ksdd_sweep) is a sweep; CRITERION_BUDGET
    (ours_c4_r40) is one row of such a grid by itself.
    """
    job = None
    if recipe not in recipes() and Path(recipe).suffix not in (".yaml", ".yml"):
        from vss.cli.sweep import row_recipe, run_grid

        settings: list[Override] = [*given.items(), *(overrides or [])]
        if run_grid(recipe, to, settings, dry_run=dry_run):
            return
        job = row_recipe(recipe, settings)
    job = job or recipe_of(given, overrides, recipe)
    if dry_run:
        out.print(yaml12.dump(job.model_dump(mode="json")), highlight=False)
        return

    from vss.run.inputs import require_engines, require_job

    require_job(job)
    require_engines(job)
    from vss.core.report import read_report
    from vss.run.job import run as run_recipe

    folder = to or Path("runs") / safe_name(job.name)
    try:
        result = run_recipe(job, folder, say=print_step, progress=bars(), command=command_line())
    except GateFailed:
        _print_result(read_report(folder / "report.json"), job.name)
        raise
    _print_result(result, job.name)
    page = folder / "report.html"
    out.print(f"report: {page}")
    if noisy := result["bench"]["noise"]:
        raise NotMeasured(f"all but the times is done and stands in {page}. {noisy} The same command times again.")


def _print_result(report: dict[str, Any], name: str) -> None:
    print_table(report["rows"], COLUMNS, name)
    print_gates(report["gate"])
    print_open(report)


TRAIN = ("train.epochs", "train.batch_size", "train.lr", "train.devices", "train.num_nodes")
FINETUNE = (
    "finetune.freeze",
    "finetune.freeze_norms",
    "finetune.distill",
    "finetune.epochs",
    "finetune.batch_size",
    "finetune.lr",
)


NETWORK = ("model.name", "model.factory", "model.options", "model.weights", "model.replace_head")


@takes(given=recipe_keys(*DATA, "data.size", *NETWORK, *TRAIN, "seed"))
def train(given: Given, save: Save = Path("runs/train"), recipe: RecipeName = None, overrides: Set = None) -> None:
    """Train a network and write its best epoch to SAVE/best.safetensors.

    The same command goes on where it was stopped.
    """
    from vss.run.inputs import require_job

    job = recipe_of(given, overrides, recipe)
    require_job(job)
    from vss.run.project import Project

    project = Project.open(job)
    _print_fit(project.train(project.build_model(), job.train, save, progress=bars()), project.task.title)


@takes(given=recipe_keys(*FINETUNE, "model.replace_head", *DATA, "seed"), network=network_of)
def finetune(
    ckpt: Ckpt,
    given: Given,
    network: Given,
    save: Save = Path("runs/finetune"),
    recipe: RecipeName = None,
    teacher: Annotated[Path | None, Option(help="checkpoint of the unpruned network, to distil from")] = None,
    overrides: Set = None,
) -> None:
    """Train a checkpoint further, pruned or not, alone or with a teacher.

    The same command goes on where it was stopped.
    """
    from vss.run.inputs import recipe_around

    if ckpt.resolve().parent == save.resolve():
        raise VssError(f"--ckpt {ckpt} lies in the folder that is written; choose another --save than {save}.")
    if given.get("model.replace_head"):
        given["model.checkpoint"] = str(ckpt)
    job = recipe_of(given | network, overrides, recipe)
    recipe_around(ckpt, **_own_data(given), recipe=job)
    if teacher:
        require_checkpoint(teacher)
    from vss.run.project import project_of, teacher_of

    project = project_of(ckpt, **_own_data(given), recipe=job)
    net = project.load(ckpt)
    source = teacher_of(teacher, project, net) if teacher else None
    fit = job.finetune
    if source and "finetune.distill" not in given and not fit.distill:
        fit = fit.model_copy(update={"distill": 1.0})
    _print_fit(project.train(net, fit, save, teacher=source, progress=bars()), project.task.title)


def _own_data(given: Given) -> dict[str, Any]:
    """Data set and folder of the flags; None is that of the checkpoint or recipe."""
    return {"dataset": given.get("data.dataset"), "data_root": given.get("data.root")}


def _print_fit(result: dict[str, Any], title: str) -> None:
    score, epoch = result[f"best_{result['metric']}"], result["best_epoch"] + 1
    out.print(f"best val {title} {score:.2f} in epoch {epoch} of {result['epochs']}: {result['best']}")


ONE_BUDGET = "give exactly one of --global-ratio, --local-ratio, --macs, --params and --latency."


def budget_of(
    global_ratio: Annotated[float | None, Option(help="fraction of all channels to remove, 0 to 0.999")] = None,
    local_ratio: Annotated[float | None, Option(help="fraction of every group to remove, 0 to 0.999")] = None,
    macs: Annotated[float | None, Option(help="fraction of the MACs to keep, 0.001 to 1")] = None,
    params: Annotated[float | None, Option(help="fraction of the parameters to keep, 0.001 to 1")] = None,
    latency: Annotated[str | None, Option(help="time to reach, measured: 0.5x of the uncut network's, or 12ms")] = None,
    lut: Annotated[Path | None, Option(help="latency table to read; default: one is made in SAVE")] = None,
) -> Given:
    """The one budget that flags ask for, as keys of the recipe; none where there is --ratio alone."""
    given: list[tuple[str, float | str | None, str]] = [
        ("--global-ratio", global_ratio, "channels global"),
        ("--local-ratio", local_ratio, "channels local"),
        ("--macs", macs, "macs"),
        ("--params", params, "params"),
        ("--latency", latency, ""),
    ]
    chosen = [each for each in given if each[1] is not None]
    if not chosen and not lut:
        return {}
    if len(chosen) != 1:
        raise VssError(ONE_BUDGET)
    [(flag, value, meaning)] = chosen
    if isinstance(value, str):
        return {"prune.latency": {"target": value, "lut": str(lut) if lut else None}}
    if lut:
        raise VssError("--lut is the table of --latency; give both.")
    kind, *scope = meaning.split()
    value = float(value or 0.0)
    keep = 1 - value if kind == "channels" else value
    if not MIN_KEPT <= keep <= 1:
        wanted = f"remove, 0 to {1 - MIN_KEPT}" if kind == "channels" else f"keep, {MIN_KEPT} to 1"
        raise VssError(f"{flag} is {value}; expected a fraction to {wanted}.")
    own = {"prune.budget.scope": scope[0]} if scope else {}
    return {"prune.budget.kind": kind, "prune.budget.keep": keep} | own


def _require_budget(ctx: typer.Context, given: Given, budget: Given) -> None:
    """One thing says how much stays, and flags that it leaves without a meaning are refused."""
    lent = str(given.get("prune.widths", "")).endswith(".json")  # a plan, whose widths are kept
    if not budget and "prune.budget.ratios" not in given and not lent:
        raise VssError(ONE_BUDGET)
    if lent:
        flags = ("macs", "params", "global_ratio", "local_ratio", "latency", "lut", *ASKED)
        refuse_given(ctx, flags, "says how much stays, and so does the plan of --widths")
    if "prune.budget.scope" in budget or "prune.latency" in budget:
        refuse_given(ctx, ["prune.budget.scope"], "is for --macs and --params; other budgets say it themselves")


def _require_target(ctx: typer.Context, job: Recipe) -> None:
    """`--align auto` wants a target, which nothing else reads."""
    if job.prune.latency:
        return
    if job.prune.budget.align != "auto":
        refuse_given(ctx, ["build.backend", "precision"], "is for --align auto and --latency")
    elif "backend" not in job.build.model_fields_set:
        raise VssError(
            "--align auto takes the step that costs the target no extra kernels; say which: --backend tensorrt "
            "--precision fp16, for example, or give a number."
        )


SCORED = ("prune.criterion", "prune.options")
ASKED = ("prune.budget.scope", "prune.budget.align", "prune.budget.floor")  # of a budget that is searched
CUT = ("prune.budget.ratios", "prune.widths", "prune.keep", *ASKED, "prune.steps", "prune.batches")


@takes(
    given=recipe_keys(*SCORED, *CUT, "model.replace_head", "build.backend", *DATA, "data.size", "seed"),
    budget=budget_of,
    network=network_of,
)
def prune(
    ctx: typer.Context,
    budget: Given,
    given: Given,
    network: Given,
    ckpt: Annotated[Path | None, Option(help="checkpoint to read, .safetensors")] = None,
    model: Annotated[
        str | None, Option(help="name of a network (or --model-from), with --weights, in place of --ckpt")
    ] = None,
    weights: Annotated[Path | None, Option(help="weights of --model to read: .safetensors, .pt or .pth")] = None,
    preset: Annotated[str | None, Option(help="named options of the criterion; `vss methods` lists them")] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None, Option(help="of the engine that --align auto or --latency is for")
    ] = None,
    save: Save = Path("runs/prune"),
    overrides: Set = None,
    dry_run: Annotated[bool, Option(help="print widths and locked layers, write nothing")] = False,
) -> None:
    """Score channels on training images, cut the network and check the cut.

    Writes plan.json and pruned.safetensors, whose outputs equal those of the masked network.
    """
    from vss.run.inputs import recipe_to_prune, require_criterion

    _require_budget(ctx, given, budget)
    budget = budget or {"prune.budget.keep": 1.0}
    if dry_run and "prune.latency" in budget:
        raise VssError("--latency builds and measures engines, which is no dry run; leave --dry-run off.")
    if preset:
        options = given.get("prune.options", {})
        if "preset" in options:
            raise VssError("--option 'preset' is given twice, as --preset too; give it once.")
        given["prune.options"] = options_of([f"preset={preset}"]) | options
    if "prune.latency" in budget:
        budget["prune.latency"] |= {"precision": precision} if precision else {}
    elif precision not in (None, "fp32"):
        given["precision.kinds"] = [precision]
    job = recipe_of(given | budget | network, overrides)
    _require_target(ctx, job)
    source: Any = {**_own_data(given), "size": given.get("data.size")}
    recipe_to_prune(job, ckpt, model, weights, **source)
    require_criterion(job.prune)
    from vss.run import pruning

    project, net = pruning.network_to_prune(job, ckpt, model, weights, **source)
    if dry_run:
        groups = pruning.groups_of(project, net)
        config, why = pruning.with_step(project, net, job.prune, groups)
        lender = pruning.lender_of(project, net, config, groups)
        plan = pruning.plan_once(project, net, config, config.budget, why=why, lender=lender, groups=groups)
        figures = pruning.describe(plan, groups)
    else:
        with at_work(save, deep=False):
            _, figures = pruning.prune(project, net, job.prune, save, progress=bars())
    _print_pruned(figures, None if dry_run else save)


def _print_pruned(figures: Pruned, save: Path | None) -> None:
    """Widths, what is locked, and what was kept; `save` is where the cut network was written."""
    widths = [{"name": g, "before": a, "after": b} for g, (a, b) in figures.widths.items()]
    print_table(widths, {"name": "group", "before": "before", "after": "after"})
    if "align_why" in figures.budget:
        out.print("widths in steps of {align}, {align_why}".format(**figures.budget), highlight=False)
    for lock in figures.locked:
        out.print(f"locked: {lock['layer']}: {lock['reason']}")
    out.print("kept: " + ", ".join(f"{share:.1%} of the {kind}" for kind, share in figures.kept.items()))
    if save:
        out.print(f"masked == sliced to {figures.checks['masked_max_rel']:.1e} (relative); wrote {save}/plan.json")


def methods() -> None:
    """List pruning criteria: what each needs, how its paper ranks, its presets and its source."""
    from vss.prune.criteria import method_rows

    heads = {
        "name": "criterion", "aliases": "also", "needs": "needs", "sparse_phase": "sparse phase", "ranking": "ranking",
        "presets": "presets", "source": "source",
    }  # fmt: skip
    print_table(method_rows(), heads)


@takes(given=recipe_keys(("prune.batches", 4), ("prune.batch_size", 8), *DATA, "seed"), network=network_of)
def quality(
    ckpt: Ckpt,
    criteria: Criteria,
    given: Given,
    network: Given,
    channels: Annotated[
        int, Option("--oracle-channels", "--channels", min=1, max=100_000, help="channels left out one by one")
    ] = 64,
    macs: Annotated[float, Option(min=0.001, max=1, help="fraction of the MACs to keep, for the output error")] = 0.5,
    sensitivity: Annotated[str | None, Option(help="criterion to cut every group with, one by one")] = None,
    report: ReportFile = None,
) -> None:
    """Judge criteria without fine-tuning: overlap with an oracle, output error, correlations, sensitivity."""
    from vss.prune.criteria import parse_methods
    from vss.run.inputs import recipe_around

    names, job = criteria.split(","), recipe_of(given | network)
    parse_methods([*names, *([sensitivity] if sensitivity else [])])
    recipe_around(ckpt, **_own_data(given), recipe=job)
    from vss.run import quality as judge

    subject = judge.Subject.open(ckpt, job, **_own_data(given), channels=channels)
    out.print(subject.cost_sentence(), highlight=False)
    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("oracle", total=len(subject.sample))
        figures = judge.compare(subject, names, keep=macs, tick=lambda: bar.advance(task))
    if sensitivity:
        figures["sensitivity"] = judge.scan(subject, sensitivity)
    heads = {
        "name": "criterion", "overlap_25": "top 25 %", "overlap_50": "top 50 %", "rank_correlation": "oracle rank",
        "relative_error": "output error", "note": "note",
    }  # fmt: skip
    print_table(figures["methods"], heads, "against the oracle (chance: 0.25, 0.50, 0, -)")
    pairs = [{"name": row["name"], **row["correlations"]} for row in figures["methods"]]
    print_table(pairs, {"name": "rank correlation", **{row["name"]: row["name"] for row in pairs}})
    if sensitivity:
        rows = [{"name": row["group"], **row} for row in figures["sensitivity"]]
        print_table(rows, {"name": "group", "ratio": "removed", "value": "loss", "change": "change"}, "sensitivity")
    write_figures(report, "vss.quality", figures)
