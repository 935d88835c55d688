"""Pruning on a project: the training phase of the method, calibration, plan, cut, proof, rounds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vss.core.config import DmcpConfig, FitConfig, PruneConfig, Recipe, SparseConfig
from vss.core.errors import VssError
from vss.deploy import backends as target
from vss.deploy.backends import main_of, others_of
from vss.prune import (
    CRITERIA,
    Budget,
    Criterion,
    Groups,
    Plan,
    Statistics,
    apply_plan,
    find_groups,
    make_criterion,
    make_plan,
    recalibrate_bn,
    verify,
)
from vss.prune.budget import borrowed, multiple_of
from vss.prune.make import Choose, norm_of_single_values, refuse_single_images
from vss.prune.phases import scale_facts
from vss.prune.probe import two_sizes
from vss.run import inputs, runner
from vss.run.latency import LatencyGoal
from vss.run.project import Project, project_of
from vss.run.runner import Json, StepResult

log = logging.getLogger(__name__)


def network_to_prune(
    recipe: Recipe,
    ckpt: Path | None,
    model: str | None,
    weights: Path | None,
    *,
    dataset: str | None,
    data_root: str | None,
    size: list[int] | None,
) -> tuple[Project, nn.Module]:
    """A checkpoint, or the flat state dict `weights` of the network `model` that something else has trained, with its
    data opened. `size` is that of images, (H, W), of a named network alone; a checkpoint knows its own."""
    where: Any = {"dataset": dataset, "data_root": data_root}
    named, source = inputs.recipe_to_prune(recipe, ckpt, model, weights, **where, size=size)
    if source == ckpt:
        project = project_of(source, **where, recipe=recipe)
        return project, project.load(source)
    project = Project.open(named)
    return project, project.build_model()


def sparsify(
    project: Project, model: nn.Module, config: PruneConfig, out: Path, *, progress: bool = True
) -> tuple[nn.Module, PruneConfig, Json]:
    """The training phase that a criterion assumes, where the recipe has it; writes `sparse.safetensors` into `out`.

    Returns:
        The network to score (the given one where there was no phase), the settings to prune it by, and figures:
        `labels` tells of a phase that the method needs and did not have.
    """
    recipe, name = project.recipe, CRITERIA.canonical(config.criterion)
    if not CRITERIA[name].sparse_phase:
        return model, config, {"labels": []}
    section: DmcpConfig | SparseConfig = recipe.dmcp if name == "dmcp" else recipe.sparse
    if not section.epochs:
        return model, config, {"labels": [f"{name} without its {'search' if name == 'dmcp' else 'sparse phase'}"]}
    settings = {"epochs": section.epochs, "lr": section.lr or recipe.train.lr, "ema": None, "distill": 0.0}
    fit_config = recipe.train.model_copy(update=settings)
    about = runner.depends(recipe, "sparse", project.fingerprint("train", "val"))
    folder = runner.fit_folder(out / "sparse", about, [model])
    work = _search if isinstance(section, DmcpConfig) else _penalise
    net, config, facts = work(project, model, config, fit_config, folder, progress)
    project.save(net.eval(), out / "sparse.safetensors")
    return net, config, {"labels": [], **facts}


def _penalise(
    project: Project, model: nn.Module, config: PruneConfig, fit_config: FitConfig, folder: Path, progress: bool
) -> tuple[nn.Module, PruneConfig, Json]:
    from vss.train.search import SparsePhase

    sparse, net = project.recipe.sparse, copy.deepcopy(model)
    groups = find_groups(model, torch.zeros(1, 3, *project.preprocess.size), keep=config.keep)
    before = scale_facts(net, groups)
    phase = SparsePhase(groups, sparse.lambda_, sparse.group_lasso)
    result = project.train(net, fit_config, folder, progress=progress, phase=phase)
    facts = {"curves": result["curves"], "scales_before": before, "scales": scale_facts(net.cpu(), groups)}
    return net, config, facts


def _search(
    project: Project, model: nn.Module, config: PruneConfig, fit_config: FitConfig, folder: Path, progress: bool
) -> tuple[nn.Module, PruneConfig, Json]:
    """DMCP's search on a copy; its widths become options of the criterion."""
    from vss.train.search import search

    if config.steps > 1:
        raise VssError("dmcp searches all widths at once; set prune.steps to 1.")
    net, facts = search(
        model, project.fit_data(fit_config), fit_config, project.recipe.dmcp, folder,
        example=torch.zeros(1, 3, *project.preprocess.size), save=project.save, kind=config.budget.kind,
        keep=config.budget.keep, align=multiple_of(config.budget), stay=config.keep,
        batches=project.calibration(config.batches, config.batch_size), loss=project.task.calibration_loss(),
        seed=project.recipe.seed, progress=progress,
    )  # fmt: skip
    options = config.options | {"order": "index", "widths": facts["widths"]}
    curves = facts.pop("fit")["curves"]
    return net.cpu(), config.model_copy(update={"options": options}), {"curves": curves, "search": facts}


def with_step(project: Project, model: nn.Module, config: PruneConfig, groups: Groups) -> tuple[PruneConfig, str]:
    """The settings with a number for `prune.budget.align: auto`, the step that costs the engines of the recipe no extra
    kernels in any layer that is cut, and why; as they are, and "", where a number was asked for."""
    if config.budget.align != "auto":
        return config, ""
    build, kinds = project.recipe.build, ("fp32", *project.recipe.precision.kinds)
    layers = {slot.layer for group in groups for slot in group.slots}
    ops = ops_of(model.get_submodule(name) for name in layers)
    step, why = target.step_for([main_of(build), *others_of(build), *others_of(build, here=False)], kinds, ops)
    return config.model_copy(update={"budget": config.budget.model_copy(update={"align": step})}), f"auto: {why}"


def ops_of(layers: Iterable[nn.Module]) -> set[str]:
    """The convolutions among some layers, as ONNX calls them."""
    kinds = nn.modules.conv._ConvTransposeNd, nn.modules.conv._ConvNd
    ops = ["ConvTranspose" if isinstance(layer, kinds[0]) else "Conv" for layer in layers if isinstance(layer, kinds)]
    return set(ops)


def plan_once(
    project: Project,
    model: nn.Module,
    config: PruneConfig,
    budget: Budget,
    labels: Iterable[str] = (),
    *,
    why: str = "",
    statistics: Statistics | None = None,
    choose: Choose | None = None,
    lender: Plan | None = None,
    origin: Mapping[str, int] | None = None,
    groups: Groups | None = None,
) -> Plan:
    """One calibration pass on training images (unless its `statistics` are known), then the budget search.

    `labels` are written into the plan, and `why` its step of widths is as it is, see `with_step`; `choose` decides in
    place of the budget, which counts of the widths `origin`, and so does `lender`, whose widths are kept.
    """
    source = str(config.widths)
    criterion = make_criterion(config.criterion, **config.options)
    if criterion.needs:
        project.task.check_labels("train")
    split = project.split("train")
    images = min(config.batches * config.batch_size, len(split))
    plan = make_plan(
        model,
        torch.zeros(1, 3, *project.preprocess.size),
        criterion=criterion,
        budget=budget,
        batches=project.calibration(config.batches, config.batch_size) if criterion.needs else None,
        loss=project.task.calibration_loss(),
        seed=project.recipe.seed,
        keep=config.keep,
        statistics=statistics,
        choose=(lambda free, scores, _: borrowed(lender, source, free, scores)) if lender else choose,
        origin=origin,
        groups=groups,
        calibration={
            "dataset": project.data.name,
            "split": "train",
            "split_sha256": split.sha256(),
            "images": images if criterion.needs else 0,
            "preprocess_sha256": project.preprocess.sha256,
            "batch_norm": "eval",
        },
    )
    budget_facts = plan.budget | ({"align_why": why} if why else {})
    if lender:
        budget_facts = lender.budget | {"widths": source, "widths_plan_sha256": lender.sha256()}
    return plan.model_copy(update={"labels": tuple(labels), "budget": budget_facts})


def criteria_of(config: PruneConfig) -> list[Criterion]:
    """The criterion that chooses channels, and after it the one whose widths are kept, if any."""
    own = make_criterion(config.criterion, **config.options)
    return [own] if config.widths is None or config.lender else [own, make_criterion(config.widths)]


def lender_of(
    project: Project, model: nn.Module, config: PruneConfig, groups: Groups, statistics: Statistics | None = None
) -> Plan | None:
    """The plan whose widths `prune.widths` borrows: a file, or what another criterion decides under the same budget."""
    if config.widths is None or config.lender:
        return Plan.load(config.lender) if config.lender else None
    other = config.model_copy(update={"criterion": config.widths, "options": {}, "widths": None})
    mine, theirs = criteria_of(config)
    shared = statistics if statistics and mine.batch_norm_mode() == theirs.batch_norm_mode() else None
    if shared and not {str(need) for need in theirs.needs} <= shared[0].keys():
        shared = None
    return plan_once(project, model, other, config.budget, statistics=shared, groups=groups)


def prune(
    project: Project,
    model: nn.Module,
    config: PruneConfig,
    out: Path,
    *,
    progress: bool = True,
    statistics: Statistics | None = None,
) -> tuple[nn.Module, Pruned]:
    """Score, cut and prove, in one round or several; writes `plan.json` and `pruned.safetensors` into `out`.

    A criterion that assumes a training phase has it first, see `sparsify`. `model` is not changed; `statistics` are
    those of a calibration pass over it, for the first round, unless a sparse phase has changed it.

    Returns:
        The cut network with recalibrated batch norms, and figures for the report.
    """
    if config.recalibrate and min(config.batch_size, len(project.split("train"))) == 1:
        refuse_single_images(model, torch.zeros(1, 3, *project.preprocess.size))
    given, asked = model, config.budget
    first = groups_of(project, model)
    config, why = with_step(project, model, config, first)
    model, config, phase = sparsify(project, model, config, out, progress=progress)
    known = statistics if model is given else None
    if config.latency:  # its table knows the step
        config, why = config.model_copy(update={"budget": asked}), ""
    goal = LatencyGoal.open(project, model, config, out) if config.latency else None
    lender = lender_of(project, model, config, first, known)
    small, checks, origin = model, Json(), dict[str, int]()
    plan: Plan | None = None
    for step in range(1, config.steps + 1):
        keep = round(1 - (1 - config.budget.keep) * step / config.steps, 12)
        budget = config.budget.model_copy(update={"keep": keep})
        now = plan_once(
            project, small, config, budget, phase["labels"],
            why=why, choose=goal, lender=lender, origin=origin,
            statistics=known if step == 1 else None, groups=first if step == 1 else None,
        )  # fmt: skip
        if goal:
            now, phase["latency"] = goal.sign(now), goal.record
        cut = apply_plan(small, now)
        checks = verify(small, cut, now, two_sizes(project.preprocess.size, model))
        plan = plan.then(now) if plan else now
        origin = {group: before for group, (before, _) in plan.widths().items()}
        recalibrate(project, cut, config)
        if config.epochs_between and step < config.steps:
            between = project.recipe.finetune.model_copy(update={"epochs": config.epochs_between, "val_every": 1})
            teacher = copy.deepcopy(given) if between.distill else None
            about = runner.depends(project.recipe, "finetune", project.fingerprint("train", "val"))
            nets = filter(None, [cut, teacher])
            folder = runner.fit_folder(out / f"round-{step}", [about, config.epochs_between], nets)
            project.train(cut, between, folder, teacher=teacher, progress=progress)
        small = cut
        kept = ", ".join(f"{share:.1%} of {kind}" for kind, share in describe(plan, first).kept.items())
        log.info("prune: round %d/%d, kept %s", step, config.steps, kept)
    assert plan is not None  # there is a round at least
    plan.save(out / "plan.json")
    project.save(small, out / "pruned.safetensors")
    return small, describe(plan, first, checks=checks, plan_sha256=plan.sha256(), phase=phase)


def recalibrate(project: Project, model: nn.Module, config: PruneConfig) -> None:
    """Batch-norm statistics of the cut network from training images."""
    if config.recalibrate:
        batches = project.calibration(config.recalibrate, config.batch_size)
        least = 2 if norm_of_single_values(model, torch.zeros(1, 3, *project.preprocess.size)) else 1
        recalibrate_bn(model, (images for images, _ in batches if len(images) >= least))


@dataclass(frozen=True, kw_only=True)
class Pruned(StepResult):
    """What a report says of a plan, and of the layers that it could not cut.

    Attributes:
        widths: group id -> channels before and after.
        kept: "channels", "params", "macs" -> fraction.
        checks: of `verify`; none where nothing was cut.
        phase: figures of the training phase (`curves`, `labels`, ...) and of the latency target.
    """

    criterion: str
    options: Json
    budget: Json
    calibration: Json
    labels: list[str]
    widths: dict[str, list[int]]
    kept: dict[str, float]
    locked: list[dict[str, str]]
    checks: Json = field(default_factory=dict)
    plan_sha256: str = ""
    phase: Json = field(default_factory=dict)


def describe(plan: Plan, groups: Groups, **more: Any) -> Pruned:
    """The result for a plan of these groups; `more` of its fields."""
    before, after = plan.cost_before, plan.cost_after
    return Pruned(
        criterion=plan.criterion,
        options=plan.criterion_options,
        budget=plan.budget,
        calibration=plan.calibration,
        labels=list(plan.labels),
        widths={group: list(widths) for group, widths in plan.widths().items()},
        kept={kind: after[kind] / before[kind] for kind in before},
        locked=[{"layer": lock.layer, "reason": lock.reason} for lock in groups.locked],
        **more,
    )


def groups_of(project: Project, model: nn.Module) -> Groups:
    """What of a network can be cut, and what is locked."""
    return find_groups(model, torch.zeros(1, 3, *project.preprocess.size), keep=project.recipe.prune.keep)
